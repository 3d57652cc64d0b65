"""Whether a role is alive: seen in how long ago its consumers polled, told over HTTP, and ended if it is stuck.

    GET /livez      200; 503 once a consumer has not polled for STUCK_S, or a runner has starved for as long
    GET /readyz     200 between the first polls of all consumers and the stop, unless the role says what is wrong
    GET /metrics    Prometheus

So is an event loop that hangs. All of it lives in threads of its own: an event loop that is stuck can't say so.
"""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from millstream.consumers.log.port import Consumer, Log, TransactionalConsumer
from millstream.consumers.runner.claims import ROLE as RUNNER
from millstream.producers.workers import new_worker_id, reporting
from millstream.schemas.errors import ConfigError, LogUnavailable
from millstream.schemas.metrics import POLL_AGE, Metric
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)

EXIT_STUCK = 4  # the supervisor should start it again
# Longer than a role may rightly wait without polling: for the room in a producer's buffer (60 s), then for the
# acknowledgement of what it sent while the brokers are away (180 s).
STUCK_S = 300.0
CHECK_S = 1.0


class Health:
    """Of one process. ``log`` is what the role has to use: its consumers tell when they poll.

    ``allow_idle``: between two polls the role may be busy with something else for as long as it likes; a poll may not.
    """

    def __init__(self, log: Log, stop: asyncio.Event, *, allow_idle: bool = False) -> None:
        self.log = cast(Log, _WatchedLog(log, self))
        self.registry = CollectorRegistry()
        self._stop = stop
        self.trouble: Callable[[], str | None] = lambda: None  # what keeps the role from its work; any thread may ask
        self._allow_idle = allow_idle
        self._polls: dict[object, float | None] = {}  # when each was last heard of; None: not yet
        self._ages: dict[Metric, tuple[Callable[[], float], float | None]] = {}  # each with its limit
        self._closed = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self.age(POLL_AGE, lambda: self.poll_age)

    def gauge(self, metric: Metric, value: Callable[[], float]) -> None:
        """``value`` is asked for whenever the metrics are."""
        Gauge(metric.name, metric.meaning, registry=self.registry).set_function(value)

    def age(self, metric: Metric, value: Callable[[], float], limit_s: float | None = None) -> None:
        """A gauge in seconds; beyond ``limit_s`` (`STUCK_S`) the process is stuck. ``value`` is called from any
        thread."""
        self._ages[metric] = value, limit_s
        self.gauge(metric, value)

    @property
    def poll_age(self) -> float:
        """Seconds."""
        now = time.monotonic()
        return max([0.0, *(now - last for last in list(self._polls.values()) if last is not None)])

    @property
    def ready(self) -> bool:
        return not self._stop.is_set() and None not in list(self._polls.values())

    def start(self, port: int) -> None:
        """Watches from now on; serves on all interfaces unless ``port`` is 0. Raises `ConfigError` if it is taken."""
        threading.Thread(target=self._watch, name="millstream-watch", daemon=True).start()
        if not port:
            return
        try:
            self._server = ThreadingHTTPServer(("", port), _handler(self))
        except OSError as error:
            raise ConfigError(f"--health-port {port}: {error.strerror}; choose another") from error
        threading.Thread(target=self._server.serve_forever, name="millstream-health", daemon=True).start()

    def close(self) -> None:
        """Watches and serves no more."""
        self._closed.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        if path == "/metrics":
            return 200, generate_latest(self.registry)
        if path == "/livez":
            ages = self._measured()
            body = "".join(f"{name} {age:.1f}\n" for name, age, _ in ages)
            return (503 if any(stuck for _, _, stuck in ages) else 200), body.encode()
        if path == "/readyz":
            trouble = self.trouble() if self.ready else "not ready"
            return (200, b"ready\n") if trouble is None else (503, f"{trouble}\n".encode(errors="replace"))
        return 404, b"/livez, /readyz or /metrics\n"

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_S):
            for name, age, stuck in self._measured():
                if stuck:
                    logger.critical("%s is %.0f: this process is stuck, and ends", name, age)
                    os._exit(EXIT_STUCK)

    def _measured(self) -> list[tuple[str, float, bool]]:
        """Each age by its name, and whether it is above its limit."""
        measured = [(metric.name, value(), limit_s) for metric, (value, limit_s) in list(self._ages.items())]
        return [(name, age, age > (limit_s or STUCK_S)) for name, age, limit_s in measured]

    def opened(self, consumer: object) -> None:
        self._polls[consumer] = None

    def polling(self, consumer: object) -> None:
        if self._allow_idle:
            self.heard(consumer)

    def polled(self, consumer: object) -> None:
        self._polls[consumer] = math.inf if self._allow_idle else time.monotonic()

    def heard(self, who: object) -> None:
        """Somebody lives who has to be heard of every `STUCK_S`, like a consumer."""
        self._polls[who] = time.monotonic()

    def closed(self, consumer: object) -> None:
        self._polls.pop(consumer, None)


@asynccontextmanager
async def watched(
    log: Log, topics: Topics, role: str, port: int, stop: asyncio.Event, *, allow_idle: bool = False
) -> AsyncIterator[Health]:
    """A role's process for as long as the body runs: served to probes at ``port``, ended if it is stuck, and told of on
    the workers topic (a runner tells of itself). Raises `ConfigError` if the port is taken."""
    health = Health(log, stop, allow_idle=allow_idle)
    health.start(port)

    def load() -> tuple[int, int]:
        health.heard("event loop")  # called by it every few seconds
        return 0, 0

    try:
        if role == RUNNER:
            yield health
            return
        producer = log.producer()
        try:
            async with reporting(producer, topics, role, new_worker_id(), load):
                yield health
        finally:
            try:
                await asyncio.to_thread(producer.close)
            except LogUnavailable as error:
                logger.warning("what this %s did last is not told on %s: %s", role, topics.workers, error)
    finally:
        health.close()


class _WatchedLog:
    def __init__(self, inner: Log, health: Health) -> None:
        self._inner = inner
        self._health = health

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def consumer(self, group: str | None = None) -> "_WatchedConsumer":
        return _WatchedConsumer(self._inner.consumer(group), self._health)

    def transactional_consumer(self, group: str) -> "_WatchedConsumer":
        return _WatchedConsumer(self._inner.transactional_consumer(group), self._health)


class _WatchedConsumer:
    def __init__(self, inner: Consumer | TransactionalConsumer, health: Health) -> None:
        self._inner = inner
        self._health = health
        health.opened(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def poll(self, *args: Any) -> Any:
        self._health.polling(self)
        try:
            return await self._inner.poll(*args)
        finally:  # a log that is away is no fault of ours
            self._health.polled(self)

    async def close(self) -> None:
        self._health.closed(self)
        await self._inner.close()


def _handler(health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = health.answer(self.path)
            with suppress(ConnectionError):  # the one who asked has gone
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Probes come every few seconds."""

    return Handler
