"""Health of a role's process: ages with limits, served to probes. A process that is stuck is ended.

    GET /livez      200, or 503 while an age is above its limit
    GET /readyz     200 from the first poll of every consumer until the stop, unless the role reports trouble
    GET /metrics    Prometheus

All of it runs in threads of its own, because an event loop that hangs can't answer probes.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as MetricFamily
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from millstream.consumers.log.poll_times import PollTimes
from millstream.consumers.log.port import Log
from millstream.pipeline.services.serve_asgi import listen, uvicorn_server
from millstream.producers.workers import new_worker_id, reporting
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import LogUnavailable
from millstream.schemas.metrics import LOOP_AGE, POLL_AGE, Metric

logger = logging.getLogger(__name__)

EXIT_STUCK: Final = 4  # the supervisor should start the process again
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class HealthPolicy:
    """When a process counts as stuck, and what its health server allows."""

    # Longer than a role may have to wait between polls: 60 s for room in a producer's buffer, then 180 s for the
    # acknowledgement of what it sent while the brokers are away.
    stuck_s: float = 300.0
    check_s: float = 1.0  # between two looks at the ages; a process that is stuck ends within this and its limit
    connections: int = 32  # at a time: they use up the role's file descriptors; a new one above that is closed
    connection_s: float = 10.0  # then a connection is closed, idle or not: a probe asks once


class Check(NamedTuple):
    """Something that is stuck above a certain age."""

    metric: Metric
    age_s: Callable[[], float]  # called from any thread
    limit_s: float


class Health:
    """Of one process. ``polls``: the poll times of its open consumers (`Log.polls`).

    ``allow_idle``: the time between two polls is unlimited, that of a poll is not.
    """

    def __init__(
        self,
        polls: Callable[[], list[PollTimes]],
        stop: asyncio.Event,
        policy: HealthPolicy = HealthPolicy(),
        *,
        allow_idle: bool = False,
    ) -> None:
        self.registry = CollectorRegistry()
        self.trouble: Callable[[], str | None] = lambda: None  # what keeps the role from working; from any thread
        self._polls = polls
        self._stop = stop
        self._policy = policy
        self._allow_idle = allow_idle
        self._checks: list[Check] = []
        self._closed = threading.Event()
        self._server: uvicorn.Server | None = None
        self._serving: threading.Thread | None = None
        self.check(POLL_AGE, self._poll_age_s)

    def export(self, metric: Metric, value: Callable[[], float]) -> None:
        """Exports a gauge or counter. ``value`` is called at each scrape, from any thread."""
        self.registry.register(_Exported(metric, value))

    def check(self, metric: Metric, age_s: Callable[[], float], limit_s: float | None = None) -> None:
        """Exports an age, above whose limit (`HealthPolicy.stuck_s` if None) the process is stuck."""
        self._checks = [*self._checks, Check(metric, age_s, limit_s or self._policy.stuck_s)]
        self.export(metric, age_s)

    def _poll_age_s(self) -> float:
        now, polls = time.monotonic(), self._polls()
        times = [poll.polling_since if self._allow_idle else poll.last_poll for poll in polls]
        return max((now - at for at in times if at is not None), default=0.0)

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        if path == "/metrics":
            return 200, generate_latest(self.registry)
        if path == "/livez":
            ages = [(check, check.age_s()) for check in self._checks]
            body = "".join(f"{check.metric.name} {age_s:.1f}\n" for check, age_s in ages)
            return (503 if any(age_s > check.limit_s for check, age_s in ages) else 200), body.encode()
        if path == "/readyz":
            ready = not self._stop.is_set() and all(poll.last_poll is not None for poll in self._polls())
            trouble = self.trouble() if ready else "not ready"
            return (200, b"ready\n") if trouble is None else (503, f"{trouble}\n".encode(errors="replace"))
        return 404, b"/livez, /readyz or /metrics\n"

    async def respond(self, request: Request) -> Response:
        """The endpoint of all paths."""
        http_status, body = self.answer(request.scope["path"])
        return Response(body, http_status, media_type=CONTENT_TYPE)

    def start(self, host: str, port: int) -> None:
        """Ends the process if it is stuck from now on; serves unless ``port`` is 0. Raises `ConfigError` if the address
        is not available."""
        listener = listen(host, port) if port else None
        threading.Thread(target=self._end_if_stuck, name="millstream-watch", daemon=True).start()
        if listener is not None:
            app = Starlette(routes=[Route("/{path:path}", self.respond)])
            self._server = uvicorn_server(app, http=_bounded(self._policy), loop="asyncio", lifespan="off")
            self._serving = threading.Thread(
                target=self._server.run, args=([listener],), name="millstream-health", daemon=True
            )
            self._serving.start()

    def close(self) -> None:
        """Stops watching and serving."""
        self._closed.set()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            self._serving.join()

    def _end_if_stuck(self) -> None:
        while not self._closed.wait(self._policy.check_s):
            for metric, age_s, limit_s in self._checks:
                if (age := age_s()) > limit_s:
                    logger.critical("%s is %.0f: this process is stuck and ends", metric.name, age)
                    os._exit(EXIT_STUCK)


class _Exported:
    """A collector of one value. Prometheus' own counters can't be set."""

    def __init__(self, metric: Metric, value: Callable[[], float]) -> None:
        self._metric = metric
        self._value = value

    def collect(self) -> Iterable[MetricFamily]:
        family = CounterMetricFamily if self._metric.type == "counter" else GaugeMetricFamily
        yield family(self._metric.name, self._metric.meaning, self._value())


def _bounded(policy: HealthPolicy) -> type[H11Protocol]:
    """uvicorn's protocol, bounded in connections and in their time."""

    class Bounded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            full = len(self.connections) > policy.connections
            self.loop.call_later(0.0 if full else policy.connection_s, transport.close)

    return Bounded


@asynccontextmanager
async def watched(
    log: Log,
    settings: Settings,
    role: str,
    port: int,
    stop: asyncio.Event,
    policy: HealthPolicy = HealthPolicy(),
    *,
    allow_idle: bool = False,
    report: bool = True,
) -> AsyncIterator[Health]:
    """Watches a role's process while the body runs: serves probes at ``health_host:port``, ends the process if it is
    stuck and, unless ``report`` is false, reports it on the workers topic. Raises `ConfigError` if the address is not
    available."""
    health = Health(log.polls, stop, policy, allow_idle=allow_idle)
    loop_ran = time.monotonic()

    async def run_regularly() -> None:
        nonlocal loop_ran
        while True:
            loop_ran = time.monotonic()
            await asyncio.sleep(policy.check_s)

    health.check(LOOP_AGE, lambda: time.monotonic() - loop_ran)
    async with AsyncExitStack() as stack:
        health.start(settings.health_host, port)
        stack.callback(health.close)
        running = asyncio.create_task(run_regularly())
        stack.callback(running.cancel)
        if report:
            await stack.enter_async_context(_reported(log, settings, role))
        yield health


@asynccontextmanager
async def _reported(log: Log, settings: Settings, role: str) -> AsyncIterator[None]:
    producer = log.producer()
    try:
        async with reporting(producer, settings.topics, role, new_worker_id()):
            yield
    finally:
        try:
            await asyncio.to_thread(producer.close)
        except LogUnavailable as error:
            logger.warning("the last report of this %s is not on %s: %s", role, settings.topics.workers, error)
