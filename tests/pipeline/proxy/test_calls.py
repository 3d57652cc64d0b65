"""The proxy, asked by the real OpenAI SDK: what reaches the model, the agent and the log."""

import asyncio
import json

import aiohttp
import openai
import pytest
from exposition import checked, text_of
from policy_server import LOGPROB, Fault, ids
from prometheus_client import CollectorRegistry
from proxy_rig import float32, int32, rig_of

from millstream.consumers.log.memory_log import MemoryLog
from millstream.producers.blob_store import Blobs
from millstream.producers.control import publish_resources
from millstream.schemas.attempt_keys import attempt_key, attempt_path
from millstream.schemas.control import LLM, Resources
from millstream.schemas.errors import LogUnavailable
from millstream.schemas.ids import new_id
from millstream.schemas.spans import semconv
from millstream.schemas.wire.topics import Topics

ASKED = {"model": "policy", "messages": [{"role": "user", "content": "say one two three"}]}
SECRET = "s3cret" * 6


async def test_a_call_is_answered_and_recorded_token_by_token(rig):
    answer = await rig.client.chat.completions.create(**ASKED, temperature=0.5, seed=7)
    assert answer.choices[0].message.content == "one two three"
    span = await rig.span()
    assert (span.rollout_id, span.attempt_id, span.source, span.kind) == (rig.rollout, rig.attempt, "proxy", "llm")
    assert span.prompt_token_ids == int32(ids("user say one two three"))
    assert span.response_token_ids == int32(ids("one two three"))
    assert span.response_logprobs == float32([LOGPROB] * 3)
    assert span.model_version == "run.0.3"
    assert span.attributes[semconv.RESPONSE_ID] == answer.id
    assert json.loads(span.attributes[semconv.REQUEST_MESSAGES]) == ASKED["messages"]
    assert json.loads(span.attributes[semconv.RESPONSE_MESSAGE]) == {"role": "assistant", "content": "one two three"}
    assert (span.attributes["gen_ai.request.temperature"], span.attributes["gen_ai.request.seed"]) == ("0.5", "7")


async def test_the_tools_that_were_offered_are_recorded(rig):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    await rig.client.chat.completions.create(**ASKED, tools=tools)
    assert json.loads((await rig.span()).attributes[semconv.TOOL_DEFINITIONS]) == tools


async def test_a_long_prompt_is_kept_by_reference(tmp_path):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    messages = [{"role": "user", "content": [image]}]
    async with rig_of(blob_url=str(tmp_path)) as rig:
        await rig.client.chat.completions.create(model="policy", messages=messages)
        span = await rig.span()
    recorded = span.attributes[semconv.REQUEST_MESSAGES]
    assert len(recorded) < 1000
    assert json.loads(Blobs(str(tmp_path)).whole(recorded)) == rig.model.requests[0]["messages"] == messages


async def test_a_call_whose_prompt_cannot_be_kept_fails_and_stays_counted(tmp_path):
    (tmp_path / "blobs").touch()
    async with rig_of(blob_url=str(tmp_path / "blobs")) as rig:
        long = [{"role": "user", "content": "say " + "A" * 1_000_000}]
        with pytest.raises(openai.InternalServerError, match="could not be recorded: content sha256"):
            await rig.client.chat.completions.create(model="policy", messages=long)
        assert await rig.spans() == []
        assert await rig.close_attempt() == (200, {"spans": 1})


async def test_the_client_sees_only_what_it_asked_for(rig):
    plain = (await rig.client.chat.completions.create(**ASKED)).model_dump()
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]
    assert plain["choices"][0]["logprobs"] is None
    asked = await rig.client.chat.completions.create(**ASKED, logprobs=True, extra_body={"return_token_ids": True})
    assert asked.choices[0].logprobs.content[0].logprob == LOGPROB
    assert asked.model_dump()["choices"][0]["token_ids"] == ids("one two three")
    assert all(request["return_token_ids"] and request["logprobs"] for request in rig.model.requests)


async def test_fields_that_change_the_answer_reach_the_model_unchanged(rig):
    """Several choices hold no single response to train on; the span shows it."""
    wanted = {
        "n": 2,
        "stop": ["end"],
        "logit_bias": {"7": -100},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    }
    answer = await rig.client.chat.completions.create(**ASKED, **wanted)
    assert len(answer.choices) == 2
    assert {name: rig.model.requests[0][name] for name in wanted} == wanted
    span = await rig.span()
    assert (span.response_token_ids, span.attributes["gen_ai.request.choice.count"]) == (None, "2")


async def test_completions_embeddings_and_models(rig):
    answer = await rig.client.completions.create(model="policy", prompt="say a b")
    assert answer.choices[0].text == "a b"
    assert answer.choices[0].logprobs is None
    streamed = [c async for c in await rig.client.completions.create(model="policy", prompt="say a b", stream=True)]
    assert "".join(chunk.choices[0].text for chunk in streamed) == "a b"
    embedded = await rig.client.embeddings.create(model="policy", input="x", encoding_format="float")
    assert embedded.data[0].embedding == [0.5, 0.25]
    whole, stream, embedding = await rig.spans()
    for span in (whole, stream):
        assert span.attributes[semconv.OPERATION] == "text_completion"
        assert span.prompt_token_ids == int32(ids("say a b"))
        assert span.response_token_ids == int32(ids("a b"))
        assert span.response_logprobs == float32([LOGPROB] * 2)
    assert (embedding.kind, embedding.attributes[semconv.INPUT_TOKENS]) == ("span", "2")
    assert [model.id async for model in rig.client.models.list()] == ["policy"]
    assert [model.id async for model in rig.claude.models.list()] == ["policy"]
    assert (await rig.client.models.retrieve("policy")).id == "policy"


async def test_cached_answers_of_external_models_are_marked():
    external = {"upstreams": {"other": {"urls": ["{url}"], "kind": "openai"}}, "routes": {"*": "other"}}
    async with rig_of(cache_ttl_s=60.0, **external) as rig:
        greedy = ASKED | {"temperature": 0}
        answers = [await rig.client.chat.completions.create(**asked) for asked in (greedy, greedy, ASKED, ASKED)]
        assert [a.choices[0].message.content for a in answers] == ["one two three"] * 4
        assert len({a.id for a in answers}) == 4
        assert len(rig.model.requests) == 3
        assert [semconv.CACHED in span.attributes for span in await rig.spans()] == [False, True, False, False]


async def test_a_policys_answers_are_never_cached():
    async with rig_of(cache_ttl_s=60.0) as rig:
        for _ in range(2):
            await rig.client.chat.completions.create(**ASKED, temperature=0)
        assert len(rig.model.requests) == 2


async def test_sampling_of_the_attempts_resources_applies_unless_the_agent_sets_it(rig):
    llm = LLM(model="policy", model_version="run.0.3", sampling={"temperature": 0.25, "top_p": 0.5})
    resources = Resources(resources_id=new_id(), experiment_id="e", items={"policy": llm})
    producer = rig.log.producer()
    await publish_resources(producer, rig.topics, resources)
    key = attempt_key(SECRET, rig.rollout, rig.attempt, valid_s=60.0, resources_id=resources.resources_id)
    await rig.proxy._control.wait_until_current()
    await rig.client.with_options(api_key=key).chat.completions.create(**ASKED, top_p=0.75)
    assert (rig.model.requests[0]["temperature"], rig.model.requests[0]["top_p"]) == (0.25, 0.75)
    assert (await rig.span()).attributes["gen_ai.request.temperature"] == "0.25"


async def test_close_waits_for_calls_under_way_and_refuses_new_ones(rig):
    rig.model.gate.clear()
    calling = asyncio.create_task(rig.client.chat.completions.create(**ASKED))
    await rig.model.asked.wait()
    closing = asyncio.create_task(rig.close_attempt())
    done, _ = await asyncio.wait([closing], timeout=0.2)
    assert not done
    with pytest.raises(openai.APIStatusError, match="has ended") as refused:
        await rig.client.chat.completions.create(**ASKED)
    assert refused.value.status_code == 410
    rig.model.gate.set()
    await calling
    assert await closing == (200, {"spans": 1})
    assert len(await rig.spans()) == 1


async def test_a_call_that_its_agent_did_not_wait_for_is_cancelled_at_the_close(rig):
    """And recorded as aborted; the answer says how many there were."""
    rig.model.gate.clear()
    calling = asyncio.create_task(rig.client.with_options(max_retries=0).chat.completions.create(**ASKED))
    await rig.model.asked.wait()
    assert await rig.close_attempt() == (200, {"spans": 1, "cancelled": 1})
    with pytest.raises(openai.APIConnectionError):
        await calling
    span = await rig.span()
    assert span.attributes["gen_ai.response.finish_reasons"] == '["abort"]'
    assert span.status_message == "its attempt has ended"


async def test_closing_an_attempt_without_calls_counts_none(rig):
    assert await rig.close_attempt() == (200, {"spans": 0})


async def test_an_attempt_that_is_older_than_the_proxy_cant_be_counted(rig):
    """The process before may have counted calls of it: better lost and retried than half a trace."""
    import time

    before = attempt_key(SECRET, rig.rollout, rig.attempt, valid_s=600.0, now=time.time() - 60)
    await rig.client.with_options(api_key=before).chat.completions.create(**ASKED)  # its calls go on
    status, body = await rig.close_attempt(before)
    assert status == 409
    assert "older than this proxy" in body["error"]["message"]


async def test_when_a_client_leaves_its_call_is_ended_and_recorded(rig):
    rig.model.gate.clear()
    calling = asyncio.create_task(rig.client.chat.completions.create(**ASKED))
    await rig.model.asked.wait()
    calling.cancel()
    async with asyncio.timeout(5):
        await rig.model.gone.wait()
        assert await rig.close_attempt() == (200, {"spans": 1})
    span = await rig.span()
    assert (span.status, span.status_message) == ("Error", "the client has gone")


async def test_the_models_own_refusal_reaches_the_client(rig):
    rig.model.faults.append(Fault(400, {"error": {"message": "prompt too long", "type": "x"}}))
    with pytest.raises(openai.BadRequestError, match="prompt too long"):
        await rig.client.chat.completions.create(**ASKED)
    span = await rig.span()
    assert (span.status, span.status_message, span.response_token_ids) == ("Error", "prompt too long", None)


async def test_a_call_that_cannot_be_recorded_fails():
    class DownLog(MemoryLog):
        def producer(self, **options):
            inner = super().producer(**options)

            class Down:
                def send(self, *args, on_ack=None, **kwargs):
                    on_ack(LogUnavailable("no broker"), -1)

                def __getattr__(self, name):
                    return getattr(inner, name)

            return Down()

    async with rig_of(DownLog(Topics("t", partitions=2))) as rig:
        with pytest.raises(openai.InternalServerError, match="could not be recorded: no broker"):
            await rig.client.chat.completions.create(**ASKED)
        with pytest.raises(openai.APIError, match="could not be recorded: no broker"):
            async for _ in await rig.client.chat.completions.create(**ASKED, stream=True):
                pass
        assert (await rig.close_attempt())[1] == {"spans": 2}  # and the attempt's count shows the hole


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", "{}", 400, "names no attempt"),
        ("{base}/v1/chat/completions", "{broken", 400, "not JSON"),
        ("{base}/v1/chat/completions", "[]", 400, "not a JSON object"),
        ("{base}/v1/chat/completions", '{"n": "many"}', 400, "n must be a whole number"),
        ("{base}/pause", "{}", 404, "unknown endpoint"),
        ("{base}/v1/audio/speech", "{}", 404, "unknown endpoint"),
    ],
)
async def test_bad_requests_are_answered_in_openais_form(rig, path, body, status, message):
    path = path.replace("{base}", attempt_path(rig.rollout, rig.attempt))
    headers = {"Authorization": f"Bearer {rig.key}"}
    async with aiohttp.ClientSession() as session, session.post(rig.url + path, data=body, headers=headers) as response:
        assert response.status == status
        assert message in (await response.json())["error"]["message"]
    assert rig.model.requests == []


# What is counted

UPSTREAM = ("upstream", "model")


def counted(registry):
    """By code."""
    found = checked(text_of(registry)).get("millstream_model_calls_total", {})
    return {dict(labels)["code"]: value for labels, value in found.items()}


async def test_calls_seconds_tokens_and_bytes_have_the_values_of_the_calls():
    registry = CollectorRegistry()
    async with rig_of(registry=registry) as rig:
        await rig.client.chat.completions.create(**ASKED)
        async for _ in await rig.client.chat.completions.create(**ASKED, stream=True):
            pass
        assert rig.proxy.recorded == 2
    samples = checked(text_of(registry))
    assert samples["millstream_model_calls_total"] == {(("code", "200"), UPSTREAM): 2}
    assert samples["millstream_model_call_seconds_count"] == {(UPSTREAM,): 2}
    assert 0 < samples["millstream_model_call_seconds_sum"][(UPSTREAM,)] < 60
    assert samples["millstream_first_token_seconds_count"] == {(UPSTREAM,): 1}  # of the stream
    assert samples["millstream_tokens_total"] == {
        (("kind", "prompt"), UPSTREAM): 2 * 5,  # "user say one two three"
        (("kind", "response"), UPSTREAM): 2 * 3,
    }
    passed = {dict(labels)["direction"]: n for labels, n in samples["millstream_proxy_bytes_total"].items()}
    assert passed["received"] > 2 * len(ASKED["messages"][0]["content"])
    assert passed["sent"] > 2 * len("one two three")


@pytest.mark.parametrize(
    ("fault", "stream", "code"),
    [
        (Fault(status=400, body={"error": {"message": "no"}}), False, "400"),
        (Fault(status=400, body={"error": {"message": "no"}}), True, "400"),
        (Fault(status=404, body={"error": {"message": "no"}}), False, "404"),
        (Fault(error_after=1), True, "broken"),
    ],
)
async def test_a_call_that_fails_is_counted_by_what_its_client_got(fault, stream, code):
    registry = CollectorRegistry()
    async with rig_of(registry=registry) as rig:
        rig.model.faults.extend([fault, *[Fault(status=500, body={})] * 10])  # no replica goes on with a stream
        with pytest.raises(openai.APIError):
            await _ask(rig, stream=stream)
    assert counted(registry) == {code: 1}


async def test_tries_beyond_the_first_are_counted():
    registry = CollectorRegistry()
    async with rig_of(registry=registry) as rig:
        rig.model.faults.append(Fault(status=503, body={}))
        await rig.client.chat.completions.create(**ASKED)
    samples = checked(text_of(registry))
    assert samples["millstream_model_retries_total"] == {(UPSTREAM,): 1}
    assert counted(registry) == {"200": 1}


@pytest.mark.parametrize(
    ("setting", "limit"),
    [("key_limits", "attempt"), ("route_limits", "model"), ("upstreams", "upstream")],
)
async def test_a_call_that_a_limit_refuses_is_counted_by_what_is_limited(setting, limit):
    registry, limits = CollectorRegistry(), {"max_concurrency": 1, "max_queue": 0}
    values = {
        "key_limits": limits,
        "route_limits": {"*": limits},
        "upstreams": {"model": {"urls": ["{url}"], "limits": limits}},
    }
    async with rig_of(registry=registry, **{setting: values[setting]}) as rig:
        rig.model.gate.clear()
        first = asyncio.create_task(_ask(rig))
        await rig.model.asked.wait()
        with pytest.raises(openai.RateLimitError):
            await _ask(rig)
        rig.model.gate.set()
        await first
    samples = checked(text_of(registry))
    assert samples["millstream_limited_total"] == {(("limit", limit),): 1}
    assert counted(registry) == {"200": 1, "429": 1}


async def test_a_client_that_leaves_is_counted_apart():
    registry = CollectorRegistry()
    async with rig_of(registry=registry) as rig:
        rig.model.gate.clear()
        asking = asyncio.create_task(_ask(rig))
        await rig.model.asked.wait()
        asking.cancel()
        async with asyncio.timeout(10):
            while not counted(registry):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        rig.model.gate.set()
    assert counted(registry) == {"499": 1}


async def _ask(rig, *, stream=False):
    answer = await rig.client.chat.completions.create(**ASKED, stream=stream)
    if stream:
        async for _ in answer:
            pass
