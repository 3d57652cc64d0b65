import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

pytest.importorskip("torch")

from examples.calculator import model
from millstream.pipeline.backend import BackendUnavailable
from millstream.pipeline.engine import Engine
from millstream.pipeline.engine_server import engine_app
from millstream.pipeline.http_backend import HttpBackend

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


async def served(handler: Any) -> TestServer:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    server = TestServer(app)
    await server.start_server()
    return server


async def test_over_http_as_in_process(engine: Engine, url: str) -> None:
    exact = REQUEST | {"seed": 3, "logprobs": True, "return_token_ids": True, "request_id": "r"}
    backend = HttpBackend(url)
    try:
        there, here = await backend.chat(exact), await engine.chat(exact)
    finally:
        await backend.close()
    assert there.model_version == "run.0.4"
    there.body["created"] = here.body["created"]
    assert there == here


async def test_the_openai_client_is_served(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
        completion = await client.chat.completions.create(model="calculator", **REQUEST)
        assert completion.choices[0].finish_reason in ("length", "stop")
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == 9
        assert [served.id async for served in client.models.list()] == ["calculator"]
        with pytest.raises(openai.BadRequestError, match="n=2"):
            await client.chat.completions.create(model="calculator", n=2, **REQUEST)


async def test_a_body_that_is_no_request(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for data in (b"{", b"[]"):
            async with session.post(f"{url}/v1/chat/completions", data=data) as response:
                assert response.status == 400
                assert "JSON" in (await response.json())["error"]["message"]
        async with session.get(f"{url}/health") as response:
            assert await response.json() == {"model_version": "run.0.4"}


async def test_a_closed_engine_answers_503(engine: Engine, url: str) -> None:
    await engine.close()
    backend = HttpBackend(url)
    answer = await backend.chat(REQUEST)
    await backend.close()
    assert answer.status == 503
    assert "closed" in answer.body["error"]["message"]


async def test_nobody_there(unused_tcp_port: int) -> None:
    backend = HttpBackend(f"http://127.0.0.1:{unused_tcp_port}")
    with pytest.raises(BackendUnavailable, match=str(unused_tcp_port)):
        await backend.chat(REQUEST)
    await backend.close()


async def test_a_server_that_hangs_up_or_hangs() -> None:
    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    for handler in (hang_up, hang):
        server = await served(handler)
        backend = HttpBackend(str(server.make_url("")), timeout_s=0.2)
        with pytest.raises(BackendUnavailable, match="/v1/chat/completions"):
            await backend.chat(REQUEST)
        await backend.close()
        await server.close()


async def test_something_else_than_json() -> None:
    async def page(request: web.Request) -> web.Response:
        return web.Response(status=502, text="<html>Bad gateway</html>")

    server = await served(page)
    backend = HttpBackend(str(server.make_url("")))
    with pytest.raises(BackendUnavailable, match=r"502.*Bad gateway"):
        await backend.chat(REQUEST)
    await backend.close()
    await server.close()


async def test_errors_and_a_missing_version_pass_through() -> None:
    async def overloaded(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "slow down"}}, status=429)

    server = await served(overloaded)
    backend = HttpBackend(str(server.make_url("")))
    answer = await backend.chat(REQUEST)
    assert (answer.status, answer.body, answer.model_version) == (429, {"error": {"message": "slow down"}}, None)
    await backend.close()
    await server.close()
