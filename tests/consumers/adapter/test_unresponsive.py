"""An agent that does nothing for too long ends; one that waits for its model does not."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from runner_rig import assert_whole, running, settings_for_tests, write_agent

MODES = pytest.mark.parametrize("processes", [0, 1], ids=["threads", "process"])

AGENT = """
    import asyncio
    import httpx
    import millstream as ms

    async def acalls(url):
        async with httpx.AsyncClient() as client:
            await asyncio.gather(client.get(url + "/1", timeout=9), client.get(url + "/0", timeout=9))

    async def agent(input):
        if input == "asleep":
            await asyncio.sleep(60)
        elif input == "busy":
            for _ in range(30):
                ms.emit_span("step")
                await asyncio.sleep(0.1)
        elif input["how"] == "async":
            await acalls(input["url"])
        else:
            await asyncio.to_thread(httpx.get, input["url"] + "/1", timeout=9)
        return 1.0
"""


@pytest.fixture
async def proxy_url() -> AsyncIterator[str]:
    async def close(request: web.Request) -> web.Response:
        return web.json_response({"spans": 0})

    async def model(request: web.Request) -> web.Response:
        await asyncio.sleep(3.2 * int(request.match_info["slow"]))
        return web.json_response({})

    app = web.Application()
    at = "/rollout/{rollout}/attempt/{attempt}"
    app.add_routes([web.post(at + "/close", close), web.get(at + "/{slow}", model)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@MODES
async def test_only_an_agent_that_does_nothing_is_unresponsive(tmp_path: Path, processes: int, proxy_url: str) -> None:
    folder = write_agent(tmp_path, AGENT, f"does_{processes}.py")
    settings = settings_for_tests(proxy_url=proxy_url)
    calls = [{"how": how, "url": proxy_url} for how in ("async", "sync")]
    async with running(f"does_{processes}:agent", folder, processes=processes, settings=settings) as rig:
        await rig.publish(["asleep", "busy", *calls], unresponsive_s=2.0)
        ended = await rig.ends(4)
    assert_whole(ended)
    asleep = ended.pop('"asleep"').last
    assert asleep.status == "unresponsive"
    assert asleep.error is not None
    assert asleep.error.message == "the agent made no span and no model call for 2 s"
    assert {one.last.status for one in ended.values()} == {"succeeded"}, [one.last.error for one in ended.values()]
