"""Health of a role: ages with limits, readiness and metrics, as probes see them.

GET /livez      200, or 503 while an age is above its limit, or once a background task has died
GET /readyz     200 from the first poll of every consumer until the stop, unless the role reports trouble
GET /metrics    Prometheus
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from millstream.consumers.log.poll_times import PollTimes
from millstream.producers.instruments import Exported, Values
from millstream.producers.supervisor import Supervisor
from millstream.schemas.metrics import BACKGROUND_AGE, POLL_AGE, Metric

T = TypeVar("T")

READS: Final = 100  # of a value that changes meanwhile; one of them nearly always succeeds
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class HealthPolicy:
    """When a process counts as stuck, and what its probe server allows."""

    # Longer than a role may have to wait between polls: 60 s for room in a producer's buffer, then 180 s for the
    # acknowledgement of what it sent while the brokers are away.
    stuck_s: float = 300.0
    # Without a success of a background task, such as reading the control topic. Longer than the brokers are away in an
    # upgrade: a restart would not bring them back.
    background_s: float = 600.0
    check_s: float = 1.0  # between two looks at the ages: a stuck process ends that much later
    connections: int = 32  # to the probe server, at a time: they take the role's file descriptors
    connection_s: float = 10.0  # then an idle connection is closed: a probe asks once


class Check(NamedTuple):
    """Something that is stuck above a certain age."""

    metric: Metric
    age_s: Callable[[], float]  # called from any thread
    limit_s: float


class Health:
    """Of one process; any thread may ask. ``polls``: the poll times of its open consumers (`Log.polls`).
    ``background``: supervises its background tasks.

    ``allow_idle``: the time between two polls is unlimited, that of a poll is not.
    """

    def __init__(
        self,
        polls: Callable[[], list[PollTimes]],
        stop: asyncio.Event,
        policy: HealthPolicy = HealthPolicy(),
        *,
        allow_idle: bool = False,
        background: Supervisor | None = None,
    ) -> None:
        self.policy = policy
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # process_*: CPU, memory, file descriptors
        self.trouble: Callable[[], str | None] = lambda: None  # what keeps the role from working; from any thread
        self._polls = polls
        self._stop = stop
        self._allow_idle = allow_idle
        self._background = background or Supervisor()
        self._checks: list[Check] = []
        self.check(POLL_AGE, self._poll_age_s)
        self.check(BACKGROUND_AGE, lambda: self._background.age_s, policy.background_s)

    def export(self, metric: Metric, values: Callable[[], Values]) -> None:
        """Exports a gauge or counter. ``values`` is called at each scrape, from any thread."""
        self.registry.register(Exported(metric, partial(_stable, values)))

    def check(self, metric: Metric, age_s: Callable[[], float], limit_s: float | None = None) -> None:
        """Exports an age, above whose limit (`HealthPolicy.stuck_s` if None) the process is stuck."""

        def age() -> float:
            return max(_stable(age_s), 0.0)  # what it is counted from may be newer than this look at the clock

        self._checks = [*self._checks, Check(metric, age, limit_s or self.policy.stuck_s)]
        self.export(metric, age)

    def _poll_age_s(self) -> float:
        now, polls = time.monotonic(), self._polls()
        times = [poll.polling_since if self._allow_idle else poll.last_poll for poll in polls]
        return max((now - at for at in times if at is not None), default=0.0)

    def stuck(self) -> str | None:
        """What died, or the first age that is above its limit, in words."""
        if self._background.failure is not None:
            return str(self._background.failure)
        ages = ((check, check.age_s()) for check in self._checks)
        return next((f"{check.metric.name} is {age_s:.0f}" for check, age_s in ages if age_s > check.limit_s), None)

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        if path == "/metrics":
            return 200, generate_latest(self.registry)
        if path == "/livez":
            ages = "".join(f"{check.metric.name} {check.age_s():.1f}\n" for check in self._checks)
            if (stuck := self.stuck()) is None:
                return 200, ages.encode()
            return 503, f"{ages}{stuck}\n".encode(errors="replace")
        if path == "/readyz":
            ready = not self._stop.is_set() and all(poll.last_poll is not None for poll in self._polls())
            trouble = self.stuck() or self.trouble() if ready else "not ready"
            return (200, b"ready\n") if trouble is None else (503, f"{trouble}\n".encode(errors="replace"))
        return 404, b"/livez, /readyz or /metrics\n"

    async def respond(self, request: Request) -> Response:
        http_status, body = self.answer(request.scope["path"])
        return Response(body, http_status, media_type=CONTENT_TYPE)


def _stable(value: Callable[[], T]) -> T:
    """A role's value, asked for from another thread: a dictionary may change while it is summed up, and is then summed
    up again."""
    for _ in range(READS - 1):
        with suppress(RuntimeError):
            return value()
    return value()
