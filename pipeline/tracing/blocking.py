"""Runs coroutines for callers that do not await, even while a loop is running, as in a notebook."""

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


def run_blocking(work: Awaitable[T]) -> T:
    """The result of ``work``. It runs on a new loop: in this thread, or if this thread has a running loop in another
    one, while the caller and its loop wait. An interrupt of the wait cancels the work."""
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
            with suppress(RuntimeError):  # it has ended, and so has its loop
                for loop, task in running:
                    loop.call_soon_threadsafe(task.cancel)
            raise


async def _awaited(work: Awaitable[T]) -> T:
    return await work
