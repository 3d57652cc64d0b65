"""A role's process: its health is served to probes, it ends if it is stuck, and it reports on the workers topic.

Probes are answered and the process is ended by threads, because an event loop that hangs can do neither.
"""

import asyncio
import faulthandler
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.routing import Route

from millstream.consumers.log.port import Log
from millstream.pipeline.services.health import Health, HealthPolicy
from millstream.pipeline.services.serve_asgi import bounded, listen, served_in_thread
from millstream.producers.instruments import Values
from millstream.producers.supervisor import supervised, supervisor
from millstream.producers.workers import new_worker_id, reporting
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import BackgroundFailed, LogUnavailable
from millstream.schemas.metrics import BUILD_INFO, CONTAINER_MEMORY_LIMIT, LOG_BYTES, LOOP_AGE, RECORDS_UNREAD

logger = logging.getLogger(__name__)

CGROUP: Final = Path("/sys/fs/cgroup")  # in a container, its own
UNLIMITED: Final = 1 << 60  # bytes; version 1's largest number is a little below 1 << 63
EXIT_STUCK: Final = BackgroundFailed.exit_code  # the supervisor should start the process again


@asynccontextmanager
async def role_process(
    log: Log,
    settings: Settings,
    role: str,
    port: int,
    stop: asyncio.Event,
    policy: HealthPolicy | None = None,
    *,
    allow_idle: bool = False,
    report: bool = True,
) -> AsyncIterator[Health]:
    """Watches the process of a role while the body runs: answers probes at ``health_host:port`` unless ``port`` is 0,
    supervises its background tasks, ends the process if one dies or it is stuck, and reports it on the workers topic
    unless ``report`` is false. Raises `ConfigError` if the address is not available."""
    loop_ran = time.monotonic()

    async def run_regularly() -> None:
        nonlocal loop_ran
        while True:
            loop_ran = time.monotonic()
            await asyncio.sleep(health.policy.check_s)

    async with AsyncExitStack() as stack:
        background = stack.enter_context(supervised())
        health = Health(log.polls, stop, policy or HealthPolicy(), allow_idle=allow_idle, background=background)
        health.check(LOOP_AGE, lambda: time.monotonic() - loop_ran)
        health.export(BUILD_INFO, lambda: {(package_version("millstream"), role): 1.0})
        health.export(RECORDS_UNREAD, lambda: log.traffic().unread)
        health.export(LOG_BYTES, partial(_log_bytes, log))
        health.export(CONTAINER_MEMORY_LIMIT, lambda: memory_limit(CGROUP))
        if port:
            stack.enter_context(probes_answered(health, settings.health_host, port))
        stack.enter_context(_ended_if_stuck(health))
        stack.callback(background.loop("loop age", run_regularly()).cancel)
        if report:
            await stack.enter_async_context(_reported(log, settings, role))
        yield health


def memory_limit(folder: Path) -> int | None:
    """The memory limit of the control group that is mounted at the folder, in bytes; None without one. Both of the
    kernel's interfaces: version 2 writes ``max`` for no limit, version 1 the largest number of pages."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text != "max" and int(text) < UNLIMITED else None
    return None


def _log_bytes(log: Log) -> Values:
    traffic = log.traffic()
    return {("read",): traffic.read_bytes, ("written",): traffic.written_bytes}


@contextmanager
def probes_answered(health: Health, host: str, port: int) -> Iterator[None]:
    """Serves health from a thread. Raises `ConfigError` if the address is not available."""
    app = Starlette(routes=[Route("/{path:path}", health.respond)])
    http = bounded(health.policy.connections, health.policy.connection_s)
    with served_in_thread(app, listen(host, port), "millstream-health", http=http, loop="asyncio"):
        yield


@contextmanager
def _ended_if_stuck(health: Health) -> Iterator[None]:
    over, loop = threading.Event(), asyncio.get_running_loop()

    def watch() -> None:
        while not over.wait(health.policy.check_s):
            if (stuck := health.stuck()) is not None:
                logger.critical("%s: this process is stuck and ends", stuck)
                _dump_stacks(loop)
                os._exit(EXIT_STUCK)

    supervisor().thread("millstream-watch", watch)
    try:
        yield
    finally:
        over.set()


def _dump_stacks(loop: asyncio.AbstractEventLoop) -> None:
    """Writes the stacks of all threads and tasks to stderr."""
    faulthandler.dump_traceback(all_threads=True)
    with suppress(Exception):  # the loop may run meanwhile
        for task in asyncio.all_tasks(loop):
            task.print_stack()


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
