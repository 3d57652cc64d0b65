"""Coroutines for callers who do not await: also where a loop runs already, as it does in a notebook."""

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


def run_blocking(work: Awaitable[T]) -> T:
    """What ``work`` comes to. It runs on a loop of its own: in this thread, or if this one has a running loop in
    another, for which the caller (and its loop) waits. If the wait is interrupted, so is the work."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []

    async def noted() -> T:
        task = asyncio.ensure_future(_awaited(work))
        running.append((asyncio.get_running_loop(), task))
        return await task

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_awaited(work))
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(copy_context().run, asyncio.run, noted())
        try:
            return done.result()
        except BaseException:
            with suppress(RuntimeError):  # it has ended, and its loop with it
                for loop, task in running:
                    loop.call_soon_threadsafe(task.cancel)
            raise


async def _awaited(work: Awaitable[T]) -> T:
    return await work
