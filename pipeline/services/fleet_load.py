"""The load of a whole deployment: what waits, and who works. For autoscalers and Prometheus.

Work is unclaimed + running: a claim commits at once, so the group's lag alone is 0 while all slots are busy.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from millstream.consumers.log.port import Log
from millstream.consumers.unclaimed import Unclaimed, UnclaimedTasks
from millstream.consumers.workers import is_alive, read_workers
from millstream.schemas.errors import LogUnavailable, MillstreamError
from millstream.schemas.wire.topics import Topics


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    fresh_s: float = 2.0  # for which an answer is given again; scrapers and scalers ask every 10 s or so
    # Reading the log for it. The first time all waiting tasks are read: that goes on, for the next request.
    read_s: float = 8.0  # below Prometheus' default time-out of 10 s


@dataclass(frozen=True, slots=True)
class FleetLoad:
    unclaimed: Unclaimed
    running: int  # attempts
    slots: int

    def to_json(self) -> dict[str, Any]:
        """``work`` is what a scaler divides by the slots of one runner."""
        work = sum(self.unclaimed.tasks.values()) + self.running
        return {
            "work": work,
            "unclaimed": self.unclaimed.tasks,
            "oldest_unclaimed_s": round(self.unclaimed.oldest_s, 3),
            "running": self.running,
            "slots": self.slots,
            "load": load_of(work, self.slots),
        }


def load_of(work: int, slots: int) -> float | None:
    """Above 1, more runners would help. None without a slot."""
    return round(work / slots, 2) if slots else None


async def read_load(log: Log, topics: Topics, tasks: UnclaimedTasks) -> FleetLoad:
    """Raises `LogError`."""
    unclaimed = await tasks.read()
    now = time.time_ns()
    alive = [worker for worker in await read_workers(log, topics) if is_alive(worker, now)]
    return FleetLoad(unclaimed, sum(worker.running for worker in alive), sum(worker.slots for worker in alive))


class FleetLoadReader:
    """Reads it when it is asked for, once for all who ask at the same time."""

    def __init__(self, log: Log, topics: Topics, policy: LoadPolicy = LoadPolicy()) -> None:
        self._log = log
        self._topics = topics
        self._policy = policy
        self._tasks = UnclaimedTasks(log, topics)
        self._reading: asyncio.Task[FleetLoad] | None = None
        self._read_at = 0.0
        self.last: FleetLoad | None = None  # None if the last read failed

    async def read(self) -> FleetLoad:
        """Raises `LogUnavailable` if the log can't be read in time."""
        if self.last is not None and time.monotonic() - self._read_at < self._policy.fresh_s:
            return self.last
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        try:
            async with asyncio.timeout(self._policy.read_s):
                self.last = await asyncio.shield(self._reading)
        except TimeoutError:
            self.last = None
            raise LogUnavailable("the load can't be read from the log in time; ask again") from None
        except MillstreamError:
            self.last = None
            raise
        return self.last

    async def _read(self) -> FleetLoad:
        found = await read_load(self._log, self._topics, self._tasks)
        self._read_at = time.monotonic()
        return found
