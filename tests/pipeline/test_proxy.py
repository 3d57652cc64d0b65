"""The proxy, asked by the real OpenAI SDK: what reaches the model, the agent and the log."""

import asyncio
import json
import struct
from contextlib import asynccontextmanager

import aiohttp
import openai
import pytest

from millstream.pipeline.backend import BackendUnavailable, Completion
from millstream.pipeline.memory_log import MemoryLog
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.serving import serve
from millstream.producers.blob_store import Blobs
from millstream.schemas import codec, semconv
from millstream.schemas.errors import LogUnavailable
from millstream.schemas.identity import attempt_key, attempt_path
from millstream.schemas.ids import new_id
from millstream.schemas.log import Partition
from millstream.schemas.topics import Topics

TOPICS = Topics("t", partitions=2)
SECRET = "s3cret"
ASKED = {"model": "policy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


class Model:
    """A back end in vLLM's form that answers "add", after `gate` has opened."""

    def __init__(self):
        self.requests = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure = None

    async def chat(self, request):
        self.requests.append(request)
        self.asked.set()
        await self.gate.wait()
        if isinstance(self.failure, Exception):
            raise self.failure
        if self.failure is not None:
            return self.failure
        body = {
            "id": f"chatcmpl-{len(self.requests)}",
            "object": "chat.completion",
            "created": 1,
            "model": request["model"],
            "prompt_token_ids": [1, 2, 3],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "add"},
                    "finish_reason": "length",
                    "token_ids": [7],
                    "logprobs": {"content": [{"token": "add", "logprob": -0.25, "bytes": None, "top_logprobs": []}]},
                }
            ],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
        }
        return Completion(200, body, "run.0.3")

    async def close(self):
        pass


class Setup:
    def __init__(self, url, model, log):
        self.url, self.model, self.log = url, model, log
        self.rollout, self.attempt = new_id(), new_id()
        self.key = attempt_key(SECRET, self.rollout, self.attempt)
        self.base = url + attempt_path(self.rollout, self.attempt)
        self.client = openai.AsyncOpenAI(base_url=self.base + "/v1", api_key=self.key, max_retries=0)

    async def close(self, key=None):
        async with aiohttp.ClientSession() as session:
            headers = {"Authorization": f"Bearer {key or self.key}"}
            async with session.post(self.base + "/close", headers=headers) as response:
                return response.status, await response.json()

    async def spans(self):
        """Everything on the events topic."""
        consumer = self.log.consumer()
        await consumer.assign([Partition(TOPICS.events, n) for n in range(2)], "beginning")
        records = await consumer.poll(100, 0.0)
        await consumer.close()
        return [codec.decode(record.value) for record in records]


@asynccontextmanager
async def setup_of(log, **options):
    model = Model()
    async with serve(Proxy(log.producer(), TOPICS, model, SECRET, **options).app, "http://127.0.0.1:0") as url:
        found = Setup(url, model, log)
        yield found
        await found.client.close()


@pytest.fixture
async def setup():
    async with setup_of(MemoryLog(TOPICS)) as found:
        yield found


async def test_a_call_is_answered_and_lies_in_the_log_token_by_token(setup):
    answer = await setup.client.chat.completions.create(**ASKED)
    assert answer.choices[0].message.content == "add"
    (span,) = await setup.spans()
    assert (span.rollout_id, span.attempt_id, span.source, span.kind) == (setup.rollout, setup.attempt, "proxy", "llm")
    assert span.prompt_token_ids == struct.pack("<3i", 1, 2, 3)
    assert span.response_token_ids == struct.pack("<i", 7)
    assert span.response_logprobs == struct.pack("<f", -0.25)
    assert span.model_version == "run.0.3"
    assert span.attributes[semconv.RESPONSE_ID] == answer.id
    assert span.attributes[semconv.REQUEST_MESSAGES] == '[{"role": "user", "content": "hi"}]'
    assert span.attributes[semconv.RESPONSE_MESSAGE] == '{"role": "assistant", "content": "add"}'


async def test_the_tools_that_were_offered_are_recorded(setup):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    await setup.client.chat.completions.create(**ASKED, tools=tools)
    (span,) = await setup.spans()
    assert json.loads(span.attributes[semconv.TOOL_DEFINITIONS]) == tools


async def test_a_long_prompt_is_kept_by_reference(tmp_path):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    messages = [{"role": "user", "content": [image]}]
    async with setup_of(MemoryLog(TOPICS), blobs=Blobs(str(tmp_path))) as setup:
        await setup.client.chat.completions.create(**ASKED | {"messages": messages})
        (span,) = await setup.spans()
    recorded = span.attributes[semconv.REQUEST_MESSAGES]
    assert len(recorded) < 1000
    assert json.loads(Blobs(str(tmp_path)).whole(recorded)) == setup.model.requests[0]["messages"] == messages


async def test_a_call_whose_prompt_cannot_be_kept_fails_and_stays_counted(tmp_path):
    (tmp_path / "blobs").touch()
    async with setup_of(MemoryLog(TOPICS), blobs=Blobs(str(tmp_path / "blobs"))) as setup:
        with pytest.raises(openai.InternalServerError, match="could not be recorded: content sha256"):
            await setup.client.chat.completions.create(
                **ASKED | {"messages": [{"role": "user", "content": "A" * 1_000_000}]}
            )
        assert await setup.spans() == []
        assert await setup.close() == (200, {"spans": 1})


async def test_the_client_sees_only_what_it_asked_for(setup):
    plain = (await setup.client.chat.completions.create(**ASKED)).model_dump()
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]
    assert plain["choices"][0]["logprobs"] is None
    asked = await setup.client.chat.completions.create(**ASKED, logprobs=True, extra_body={"return_token_ids": True})
    assert asked.choices[0].logprobs.content[0].logprob == -0.25
    assert asked.model_dump()["choices"][0]["token_ids"] == [7]
    assert all(request["return_token_ids"] and request["logprobs"] for request in setup.model.requests)


async def test_the_cache_repeats_answers_of_temperature_zero_and_nobody_trains_on_them():
    async with setup_of(MemoryLog(TOPICS), cache_ttl=60.0) as setup:
        greedy = ASKED | {"temperature": 0}
        answers = [await setup.client.chat.completions.create(**asked) for asked in (greedy, greedy, ASKED, ASKED)]
        assert [a.choices[0].message.content for a in answers] == ["add"] * 4
        assert len({a.id for a in answers}) == 4
        assert len(setup.model.requests) == 3
        assert [span.response_token_ids is None for span in await setup.spans()] == [False, True, False, False]


async def test_close_waits_for_calls_under_way_and_refuses_new_ones(setup):
    setup.model.gate.clear()
    calling = asyncio.create_task(setup.client.chat.completions.create(**ASKED))
    await setup.model.asked.wait()
    closing = asyncio.create_task(setup.close())
    done, _ = await asyncio.wait([closing], timeout=0.2)
    assert not done
    with pytest.raises(openai.APIStatusError, match="has ended") as refused:
        await setup.client.chat.completions.create(**ASKED)
    assert refused.value.status_code == 410
    setup.model.gate.set()
    await calling
    assert await closing == (200, {"spans": 1})
    assert len(await setup.spans()) == 1


async def test_closing_an_attempt_that_never_called_counts_nothing(setup):
    assert await setup.close() == (200, {"spans": 0})


async def test_the_key_has_to_be_the_attempts_own(setup):
    other = attempt_key(SECRET, setup.rollout, new_id())
    assert (await setup.close(other))[0] == 401
    with pytest.raises(openai.AuthenticationError, match="not that of attempt"):
        await setup.client.with_options(api_key=other).chat.completions.create(**ASKED)
    assert setup.model.requests == []


async def test_a_model_that_is_away_fails_the_call_and_is_recorded(setup):
    setup.model.failure = BackendUnavailable("connection refused")
    with pytest.raises(openai.InternalServerError, match="model server doesn't answer: connection refused"):
        await setup.client.chat.completions.create(**ASKED)
    (span,) = await setup.spans()
    assert (span.status, span.attributes[semconv.ERROR_TYPE], span.response_token_ids) == ("Error", "502", None)


async def test_the_models_own_refusal_reaches_the_client(setup):
    setup.model.failure = Completion(400, {"error": {"message": "prompt too long", "type": "x"}}, None)
    with pytest.raises(openai.BadRequestError, match="prompt too long"):
        await setup.client.chat.completions.create(**ASKED)


async def test_a_call_that_cannot_be_recorded_fails():
    class DownLog(MemoryLog):
        def producer(self):
            inner = super().producer()

            class Down:
                def send(self, *args, on_ack=None, **kwargs):
                    on_ack(LogUnavailable("no broker"), -1)

                def __getattr__(self, name):
                    return getattr(inner, name)

            return Down()

    async with setup_of(DownLog(TOPICS)) as setup:
        with pytest.raises(openai.InternalServerError, match="could not be recorded: no broker"):
            await setup.client.chat.completions.create(**ASKED)
        assert (await setup.close())[1] == {"spans": 1}  # and the attempt's count shows the hole


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", "{}", 400, "names no attempt"),
        ("{base}/v1/chat/completions", "{broken", 400, "not JSON"),
        ("{base}/v1/chat/completions", "[]", 400, "not a JSON object"),
        ("{base}/v1/chat/completions", '{"stream": true}', 400, "stream"),
        ("{base}/pause", "{}", 404, "Not Found"),
        ("{base}/v1/../../../../pause", "{}", 404, "Not Found"),
    ],
)
async def test_bad_requests_are_answered_in_openais_form(setup, path, body, status, message):
    path = path.replace("{base}", attempt_path(setup.rollout, setup.attempt))
    async with aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {setup.key}"}
        async with session.post(setup.url + path, data=body, headers=headers) as response:
            assert response.status == status
            assert message in (await response.json())["error"]["message"]
    assert setup.model.requests == []
