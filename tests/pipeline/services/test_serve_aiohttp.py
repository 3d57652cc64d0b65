"""Bounds of the server that the proxy and the engine share."""

import asyncio

import pytest
from aiohttp import web

from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.errors import ConfigError

GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_connections_are_bounded_and_idle_ones_make_room() -> None:
    """Section B3: a connection too many takes the place of one that is idle, and never of one at work."""
    free, at_work = asyncio.Event(), asyncio.Semaphore(0)

    async def quick(_: web.Request) -> web.Response:
        return web.Response(text="quick")

    async def slow(_: web.Request) -> web.Response:
        at_work.release()
        await free.wait()
        return web.Response(text="slow")

    app = web.Application()
    app.add_routes([web.get("/quick", quick), web.get("/slow", slow)])
    async with serve(app, "http://127.0.0.1:0", connections=3) as url, asyncio.timeout(30):
        host, port = url.removeprefix("http://").split(":")
        busy = [await asyncio.open_connection(host, port) for _ in range(2)]
        for _, writer in busy:
            writer.write(GET % b"slow")
            await at_work.acquire()
        idle, _ = await asyncio.open_connection(host, port)
        for _ in range(5):  # each takes the place of the one before it
            reader, writer = await asyncio.open_connection(host, port)
            assert await idle.read() == b""
            writer.write(GET % b"quick")
            assert (await reader.readuntil(b"quick")).startswith(b"HTTP/1.1 200")
            idle = reader
        writer.write(GET % b"slow")
        await at_work.acquire()
        refused, _ = await asyncio.open_connection(host, port)
        assert await refused.read() == b""  # all are at work
        free.set()
        for reader, _ in [*busy, (idle, writer)]:
            assert (await reader.readuntil(b"slow")).startswith(b"HTTP/1.1 200")


async def test_a_port_is_shared_only_by_those_that_ask_for_it() -> None:
    """Section F1: another process of the same user could take a part of the calls."""
    async with serve(web.Application(), "http://127.0.0.1:0") as url:
        for reuse_port in [False, True]:
            with pytest.raises(ConfigError, match="another process may have the port"):
                async with serve(web.Application(), url, reuse_port=reuse_port):
                    pass
    async with serve(web.Application(), "http://127.0.0.1:0", reuse_port=True) as url:
        async with serve(web.Application(), url, reuse_port=True) as same:
            assert same == url
        with pytest.raises(ConfigError):
            async with serve(web.Application(), url):
                pass
