"""Whether a role is alive: seen in how long ago its consumers polled, told over HTTP, and ended if it is stuck.

    GET /livez      200; 503 once a consumer has not polled for STUCK_S
    GET /readyz     200 between the first polls of all consumers and the stop, unless the role says what is wrong
    GET /metrics    Prometheus

All of it lives in threads of its own: an event loop that is stuck can't say so.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from millstream.consumers.port import Consumer, Log
from millstream.schemas.errors import ConfigError
from millstream.schemas.log import EndOfPartition, LogRecord
from millstream.schemas.metrics import POLL_AGE, Metric

logger = logging.getLogger(__name__)

EXIT_STUCK = 4  # the supervisor should start it again
# Longer than a role may rightly wait without polling: for the room in a producer's buffer (60 s), then for the
# acknowledgement of what it sent while the brokers are away (180 s).
STUCK_S = 300.0
CHECK_S = 1.0


class Health:
    """Of one process. ``log`` is what the role has to use: its consumers tell when they poll."""

    def __init__(self, log: Log, stop: asyncio.Event) -> None:
        self.log = cast(Log, _WatchedLog(log, self))
        self._stop = stop
        self._polls: dict[_WatchedConsumer, float | None] = {}  # when each ended its last poll; None: not yet polled
        self.trouble: Callable[[], str | None] = lambda: None  # what keeps the role from its work; any thread may ask
        self._registry = CollectorRegistry()
        self.gauge(POLL_AGE, lambda: self.poll_age)

    def gauge(self, metric: Metric, value: Callable[[], float]) -> None:
        """``value`` is asked for whenever the metrics are."""
        Gauge(metric.name, metric.meaning, registry=self._registry).set_function(value)

    @property
    def poll_age(self) -> float:
        """Seconds."""
        now = time.monotonic()
        return max((now - last for last in list(self._polls.values()) if last is not None), default=0.0)

    @property
    def ready(self) -> bool:
        return not self._stop.is_set() and None not in list(self._polls.values())

    def start(self, port: int) -> None:
        """Watches from now on; serves on all interfaces unless ``port`` is 0. Raises `ConfigError` if it is taken."""
        threading.Thread(target=self._watch, name="millstream-watch", daemon=True).start()
        if not port:
            return
        try:
            server = ThreadingHTTPServer(("", port), _handler(self))
        except OSError as error:
            raise ConfigError(f"--health-port {port}: {error.strerror}; choose another") from error
        threading.Thread(target=server.serve_forever, name="millstream-health", daemon=True).start()

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        if path == "/metrics":
            return 200, generate_latest(self._registry)
        if path == "/livez":
            age = self.poll_age
            return (503 if age > STUCK_S else 200), f"last poll {age:.1f} s ago\n".encode()
        if path == "/readyz":
            trouble = self.trouble() if self.ready else "not ready"
            return (200, b"ready\n") if trouble is None else (503, f"{trouble}\n".encode(errors="replace"))
        return 404, b"/livez, /readyz or /metrics\n"

    def _watch(self) -> None:
        while (age := self.poll_age) <= STUCK_S:
            time.sleep(CHECK_S)
        logger.critical("a consumer has not polled for %.0f s: this process is stuck, and ends", age)
        os._exit(EXIT_STUCK)

    def opened(self, consumer: "_WatchedConsumer") -> None:
        self._polls[consumer] = None

    def polled(self, consumer: "_WatchedConsumer") -> None:
        self._polls[consumer] = time.monotonic()

    def closed(self, consumer: "_WatchedConsumer") -> None:
        self._polls.pop(consumer, None)


class _WatchedLog:
    def __init__(self, inner: Log, health: Health) -> None:
        self._inner = inner
        self._health = health

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def consumer(self, *args: Any, **kwargs: Any) -> "_WatchedConsumer":
        return _WatchedConsumer(self._inner.consumer(*args, **kwargs), self._health)


class _WatchedConsumer:
    def __init__(self, inner: Consumer, health: Health) -> None:
        self._inner = inner
        self._health = health
        health.opened(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def poll(
        self, max_records: int, timeout_s: float, topics: Iterable[str] | None = None
    ) -> list[LogRecord | EndOfPartition]:
        try:
            return await self._inner.poll(max_records, timeout_s, topics)
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
