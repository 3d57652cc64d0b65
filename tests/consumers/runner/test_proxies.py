"""Which proxy an attempt calls."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web
from factories import task

from millstream.consumers.runner.claims import Claim
from millstream.consumers.runner.proxies import Calls, Proxies, ProxiesPolicy, ProxyNotClosed
from millstream.schemas.control import LLM, Resources
from millstream.schemas.ids import new_id
from millstream.schemas.wire import status

LOOPBACK = "127.0.0.1"


async def test_an_attempt_stays_with_one_of_several_proxies_and_its_resources_may_name_others() -> None:
    urls = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]
    proxies = Proxies(urls, "s")
    claims = [Claim(task(), new_id(), None) for _ in range(100)]
    chosen = [proxies.choose(claim) for claim in claims]
    assert set(chosen) == set(urls)
    assert [proxies.choose(claim) for claim in claims] == chosen
    llm = LLM(model="policy", model_version="r.0.0", endpoints=("http://other:1",))
    pinned = Resources(resources_id="v", experiment_id="", items={"policy": llm})
    assert proxies.choose(replace(claims[0], resources=pinned)) == "http://other:1"
    with pytest.raises(ProxyNotClosed, match=chosen[0]) as raised:  # nothing listens
        await proxies.close_attempt(claims[0], chosen[0], proxies.key(claims[0]))
    assert raised.value.cause == status.PROXY_AWAY
    await proxies.close()


@asynccontextmanager
async def answering(code: int = 200, port: int = 0) -> AsyncIterator[str]:
    """A server that answers everything with ``code``, and 3 calls."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"spans": 3}, status=code)

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, LOOPBACK, port, reuse_address=True).start()
    yield f"http://{LOOPBACK}:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_only_proxies_that_answer_get_attempts_and_one_that_comes_back_gets_some_again() -> None:
    claims = [Claim(task(), new_id(), None) for _ in range(20)]

    def chosen() -> set[str]:
        return {proxies.choose(claim) for claim in claims}

    async with answering() as first:
        async with answering() as second:
            proxies = Proxies([first, second], "s", ProxiesPolicy(probe_s=0.0))
            async with asyncio.timeout(10):
                while chosen() != {first, second}:
                    assert await proxies.available()
                    await asyncio.sleep(0)  # other probes end
            of_second = next(claim for claim in claims if proxies.choose(claim) == second)
            assert await proxies.close_attempt(of_second, second, proxies.key(of_second)) == Calls(3, 0)
        with pytest.raises(ProxyNotClosed):
            await proxies.close_attempt(of_second, second, proxies.key(of_second))
        assert await proxies.available()
        assert chosen() == {first}
        async with answering(port=int(second.rsplit(":", 1)[1])), asyncio.timeout(10):
            while chosen() != {first, second}:
                assert await proxies.available()
                await asyncio.sleep(0)
    async with asyncio.timeout(10):
        while await proxies.available():  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert proxies.away_s > 0
    assert proxies.trouble is not None
    assert first in proxies.trouble
    assert second in proxies.trouble
    async with answering(port=int(first.rsplit(":", 1)[1])), asyncio.timeout(10):
        while not await proxies.available():  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert (proxies.trouble, proxies.away_s) == (None, 0.0)
    await proxies.close()


@pytest.mark.parametrize(
    ("code", "available", "cause"),
    [(404, True, "proxy"), (409, True, "proxy"), (502, False, "proxy_away"), (503, False, "proxy_away")],
)
async def test_a_load_balancer_without_proxies_counts_as_away(code: int, available: bool, cause: str) -> None:
    async with answering(code) as url:
        proxies = Proxies([url], "s")
        assert await proxies.available() == available
        claim = Claim(task(), new_id(), None)
        with pytest.raises(ProxyNotClosed) as raised:
            await proxies.close_attempt(claim, url, proxies.key(claim))
        assert raised.value.cause == cause
        await proxies.close()


async def test_a_proxy_that_resources_name_counts_although_that_of_the_settings_is_away() -> None:
    async with answering() as url:
        llm = LLM(model="policy", model_version="r.0.0", endpoints=(url,))
        resources = Resources(resources_id="v", experiment_id="", items={"policy": llm})
        proxies = Proxies([f"http://{LOOPBACK}:9"], "s")
        assert await proxies.available([resources])
        await proxies.close()


async def test_without_urls_there_is_no_proxy() -> None:
    assert await Proxies([], "s").available()
    assert Proxies([], "s").choose(Claim(task(), new_id(), None)) == ""
