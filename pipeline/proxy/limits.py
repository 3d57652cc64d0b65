"""Limits of one proxy: concurrent calls, requests and tokens per minute. Further calls wait in a bounded queue."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from millstream.schemas.config.upstreams import Limits


class Busy(Exception):
    """The queue is full, or the wait would be too long."""

    def __init__(self, what: str, retry_after_s: float) -> None:
        super().__init__(f"too many calls for {what}; try again in {retry_after_s:.0f} s")
        self.limit = what.partition(" ")[0]  # what is limited: attempt, model or upstream
        self.retry_after_s = retry_after_s


class Bucket:
    """A token bucket that holds a minute's worth. It may be overdrawn, because a call's tokens are known at its end."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._rate = per_minute / 60
        self._most = float(per_minute)
        self._level, self._at = self._most, now

    def take(self, amount: float, now: float) -> None:
        self._refill(now)
        self._level -= amount

    def wait_s(self, now: float) -> float:
        """Until one more may be taken."""
        self._refill(now)
        return max(0.0, (1 - self._level) / self._rate)

    def _refill(self, now: float) -> None:
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now


class Limiter:
    """Limits one key, route or upstream, which ``what`` names in errors."""

    def __init__(self, what: str, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._limits = limits
        self._clock = clock
        self._slots = asyncio.Semaphore(limits.max_concurrency) if limits.max_concurrency else None
        now = clock()
        self._requests = Bucket(limits.requests_per_minute, now) if limits.requests_per_minute else None
        self._tokens = Bucket(limits.tokens_per_minute, now) if limits.tokens_per_minute else None
        self.waiting = 0

    @asynccontextmanager
    async def call(self, deadline: float) -> AsyncIterator[None]:
        """The body is one call. Raises `Busy` if it can't begin before the deadline (of the clock)."""
        await self._wait(deadline)
        try:
            yield
        finally:
            if self._slots is not None:
                self._slots.release()

    def used(self, tokens: int) -> None:
        """Charges the tokens of a call that has ended."""
        if self._tokens is not None:
            self._tokens.take(tokens, self._clock())

    async def _wait(self, deadline: float) -> None:
        if self._wait_s() > 0 or (self._slots is not None and self._slots.locked()):
            if self.waiting >= self._limits.max_queue:
                raise Busy(self._what, max(1.0, self._wait_s()))
            self.waiting += 1
            try:
                await self._turn(deadline)
            finally:
                self.waiting -= 1
        elif self._slots is not None:
            await self._slots.acquire()  # at once
        if self._requests is not None:
            self._requests.take(1, self._clock())

    async def _turn(self, deadline: float) -> None:
        if self._slots is not None:
            try:
                await asyncio.wait_for(self._slots.acquire(), max(0.0, deadline - self._clock()))
            except TimeoutError:
                raise Busy(self._what, 1.0) from None
        try:
            while (seconds := self._wait_s()) > 0:
                if self._clock() + seconds > deadline:
                    raise Busy(self._what, seconds)
                await asyncio.sleep(seconds)
        except BaseException:
            if self._slots is not None:
                self._slots.release()
            raise

    def _wait_s(self) -> float:
        now = self._clock()
        return max((bucket.wait_s(now) for bucket in (self._requests, self._tokens) if bucket is not None), default=0.0)


@asynccontextmanager
async def all_of(limiters: Sequence[Limiter], deadline: float) -> AsyncIterator[None]:
    """Waits for each in turn."""
    async with AsyncExitStack() as stack:
        for limiter in limiters:
            await stack.enter_async_context(limiter.call(deadline))
        yield


def limited(limits: Limits) -> bool:
    """Whether any limit is set."""
    return bool(limits.max_concurrency or limits.requests_per_minute or limits.tokens_per_minute)
