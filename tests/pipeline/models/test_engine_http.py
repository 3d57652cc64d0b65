from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp.test_utils import TestServer

pytest.importorskip("torch")

from examples.calculator import model
from millstream.pipeline.models.engine import Engine
from millstream.pipeline.models.engine_http import engine_app
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


async def test_a_body_that_is_not_a_request(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for data in (b"{", b"[]"):
            async with session.post(f"{url}/v1/chat/completions", data=data) as response:
                assert response.status == 400
                assert "JSON" in (await response.json())["error"]["message"]
        async with session.get(f"{url}/health") as response:
            assert await response.json() == {"model_version": "run.0.4"}


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
