import asyncio
import gzip
import itertools
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp.test_utils import TestServer

pytest.importorskip("torch")

from examples.calculator import model
from millstream.pipeline.models.engine import Engine, EnginePolicy
from millstream.pipeline.models.engine_http import EngineHttpPolicy, engine_app
from millstream.pipeline.models.policy import parameters
from millstream.pipeline.protocols import model_version
from millstream.schemas.wire.versions import to_text

pytestmark = pytest.mark.torch

REQUEST: dict[str, Any] = {"messages": [{"role": "user", "content": "8 plus 3 ?"}], "max_tokens": 2}


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    model.create(tmp_path / "calculator")
    engine = Engine(tmp_path / "calculator", version="run.0.4")
    yield engine
    await engine.close()


@pytest.fixture
async def url(engine: Engine) -> AsyncIterator[str]:
    async with TestServer(engine_app(engine)) as server:
        yield str(server.make_url("")).rstrip("/")


async def test_over_http_as_in_process(engine: Engine, url: str) -> None:
    exact = REQUEST | {"seed": 3, "logprobs": True, "return_token_ids": True, "request_id": "r"}
    here = await engine.chat(exact)
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=exact) as response:
        assert response.headers[model_version.HEADER] == "run.0.4"
        assert await response.json() | {"created": 0} == here.body | {"created": 0}


async def test_versions_of_a_mixed_answer_are_in_the_header_and_at_the_end_of_a_stream(
    engine: Engine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(job: Any, *token: Any) -> None:
        Engine._append(engine, job, *token)
        version = f"run.0.{4 + len(job.tokens)}"
        engine.load(parameters(engine._model), version)

    monkeypatch.setattr(engine, "_append", load)
    asked = REQUEST | {"temperature": 0, "max_tokens": 3}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/v1/chat/completions", json=asked) as response:
            assert response.headers[model_version.HEADER] == "mixed"
            versions = ((0, "run.0.4"), (1, "run.0.5"), (2, "run.0.6"))
            assert response.headers[model_version.RANGES] == to_text(versions)
        engine.load(parameters(engine._model), "run.0.4")
        async with session.post(f"{url}/v1/chat/completions", json=asked | {"stream": True}) as response:
            assert response.headers[model_version.HEADER] == "run.0.4"
            assert model_version.RANGES not in response.headers
            text = await response.text()
    assert text.endswith(model_version.comment("run.0.6", versions).decode() + "data: [DONE]\n\n")


async def test_the_openai_client_is_served(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
        completion = await client.chat.completions.create(model="calculator", **REQUEST)
        assert completion.choices[0].finish_reason in ("length", "stop")
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == 9
        assert [served.id async for served in client.models.list()] == ["calculator"]
        with pytest.raises(openai.BadRequestError, match="n=2"):
            await client.chat.completions.create(model="calculator", n=2, **REQUEST)


async def post(url: str, data: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.post(f"{url}{path}", data=data, headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b"[" * 100_000, "JSON"),
        (b'{"messages": "\xff"}', "messages must be a list"),
        (b'{"messages": [], "a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"{}", "messages must be a list"),
        (b'{"messages": {"role": "user"}}', "messages must be a list"),
        (b'{"messages": [5]}', "messages[0] needs a role"),
        (b'{"messages": [{"role": 1, "content": "x"}]}', "messages[0] needs a role"),
        (b'{"messages": [{"role": "user"}]}', "messages[0] needs a role"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages[0] needs a role"),
    ],
)
async def test_a_body_that_is_not_a_request_is_refused_with_the_reason(
    url: str, path: str, body: bytes, says: str
) -> None:
    status, answer = await post(url, body, path)
    assert status == 400
    assert says in answer["error"]["message"]
    async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
        assert await response.json() == {"model_version": "run.0.4"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "NaN"),
        ("temperature", "Infinity"),
        ("temperature", "-1"),
        ("temperature", '"1"'),
        ("temperature", "true"),
        ("temperature", "1" + "0" * 400),
        ("max_tokens", "0"),
        ("max_tokens", "1.5"),
        ("max_tokens", "1e400"),
        ("max_completion_tokens", "[1]"),
        ("seed", "18446744073709551616"),
        ("seed", "-9223372036854775809"),
        ("seed", "0.5"),
        ("seed", '"1"'),
        ("stop", "5"),
        ("stop", '[""]'),
        ("stop", '["a", null]'),
        ("stop", "[" + ", ".join(['"a"'] * 17) + "]"),
        ("logprobs", "1"),
        ("logprobs", '"false"'),
        ("return_token_ids", "{}"),
        ("model", "{}"),
        ("stream", '"yes"'),
        ("stream_options", "1"),
        ("n", "2"),
        ("top_p", "NaN"),
        ("tools", "[1]"),
        ("else", '"' + "x" * 100_000 + '"'),
    ],
)
async def test_a_wrong_value_is_refused_by_its_field(url: str, field: str, value: str) -> None:
    """Sections A4 and E2: no number or text ends a batch, which others share."""
    wrong = json.dumps(REQUEST)[:-1] + f', "{field}": {value}}}'
    (status, answer), (other, _) = await asyncio.gather(
        post(url, wrong.encode()), post(url, json.dumps(REQUEST).encode())
    )
    assert (status, other) == (400, 200)
    assert field in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 500


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": "half \ud83d"}]},
        {"messages": [{"role": "\ud83d", "content": "x"}]},
        {"stop": "\ud83d"},
        {"temperature": 5e-324},
        {"temperature": 1000000},
        {"seed": (1 << 64) - 1},
        {"seed": -(1 << 63)},
        {"stream": None, "stream_options": None, "logprobs": None, "model": None, "stop": None},
        {"model": "\ud83d"},
        {"request_id": {"any": 1}},
    ],
)
async def test_odd_values_are_answered(url: str, more: dict[str, Any]) -> None:
    status, answer = await post(url, json.dumps(REQUEST | {"max_tokens": 1} | more).encode())
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 1


async def test_bodies_are_bounded_in_size_and_time(engine: Engine) -> None:
    """Sections B3 and E12: as they come, and unpacked."""
    whole = json.dumps(REQUEST).encode()
    async with TestServer(engine_app(engine, EngineHttpPolicy(body_bytes=1000, body_s=0.2))) as server:
        url = str(server.make_url("")).rstrip("/")
        assert (await post(url, whole))[0] == 200
        for data, headers in [(b" " * 1001, {}), (gzip.compress(b" " * 100_000), {"Content-Encoding": "gzip"})]:
            status, answer = await post(url, data, **headers)
            assert (status, answer["error"]["message"]) == (413, "the request is larger than 1,000 bytes")
        assert (await post(url, b"no gzip", **{"Content-Encoding": "gzip"}))[0] == 400
        assert (await post(url, gzip.compress(whole), **{"Content-Encoding": "gzip"}))[0] == 200

        async def endless() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        async with aiohttp.ClientSession() as http, http.post(f"{url}/tokenize", data=endless()) as response:
            assert response.status == 408
            assert "did not arrive within 0.2 s" in await response.text()


async def test_only_names_of_this_machine_and_known_paths_are_answered(url: str) -> None:
    """Entry F4: a web page can make its own name resolve to loopback, but not send another name."""
    body = json.dumps(REQUEST).encode()
    for host in ["evil.example", "", "[::1", "127.0.0.1.evil.example"]:
        assert (await post(url, body, Host=host))[0] == 403
    assert (await post(url, body, Host="localhost:5"))[0] == 200
    assert (await post(url, body, "/v1/completions"))[0] == 404
    assert (await post(url, body, "/health"))[0] == 405


async def test_beyond_its_queue_the_engine_asks_for_a_pause(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No queue is without a bound. What waits is answered."""
    free, asked = threading.Event(), threading.Event()
    generate = engine._generate

    def slow(jobs: Any) -> None:
        asked.set()
        assert free.wait(30)
        generate(jobs)

    monkeypatch.setattr(engine, "_generate", slow)
    monkeypatch.setattr(engine, "_policy", EnginePolicy(waiting=2))
    body = json.dumps(REQUEST).encode()
    async with TestServer(engine_app(engine)) as server:
        url = str(server.make_url("")).rstrip("/")
        first = asyncio.create_task(post(url, body))
        assert await asyncio.to_thread(asked.wait, 30)
        waiting = [asyncio.create_task(post(url, body)) for _ in range(5)]
        refused = [await each for each in itertools.islice(asyncio.as_completed(waiting), 3)]
        assert [status for status, _ in refused] == [429] * 3
        assert "2 requests are waiting, the most that this engine takes" in refused[0][1]["error"]["message"]
        async with aiohttp.ClientSession() as http, http.post(f"{url}/v1/chat/completions", data=body) as response:
            assert response.headers["Retry-After"] == "1"
        free.set()
        answers = await asyncio.gather(first, *waiting)
    assert sorted(status for status, _ in answers) == [200] * 3 + [429] * 3


async def test_a_stream_equals_a_whole_answer_and_names_its_weights_at_the_end(url: str) -> None:
    exact = REQUEST | {"model": "calculator", "seed": 3, "logprobs": True, "extra_body": {"return_token_ids": True}}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
        whole = (await client.chat.completions.create(**exact)).model_dump()
        chunks = [chunk.model_dump() async for chunk in await client.chat.completions.create(**exact, stream=True)]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    (expected,) = whole["choices"]
    assert "".join(choice["delta"]["content"] or "" for choice in choices) == expected["message"]["content"]
    assert [choice["token_ids"] for choice in choices if choice.get("token_ids")] == [expected["token_ids"]]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert choices[-1]["finish_reason"] == expected["finish_reason"]
    body = REQUEST | {"stream": True, "stream_options": {"include_usage": True}}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=body) as response:
        *_, usage, version, done, _ = (await response.text()).split("\n\n")
    assert (version, done) == (": x-model-version=run.0.4", "data: [DONE]")
    assert '"completion_tokens":2' in usage


async def test_tokens_are_counted(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/tokenize", json=REQUEST) as response:
        assert (await response.json())["count"] == 9


async def test_a_closed_engine_answers_503(engine: Engine, url: str) -> None:
    await engine.close()
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=REQUEST) as response:
        assert response.status == 503
        assert "closed" in (await response.json())["error"]["message"]
