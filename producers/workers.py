"""Reports the state of this process on the workers topic every few seconds."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from millstream.producers.log.port import Producer
from millstream.producers.supervisor import supervisor
from millstream.schemas.errors import LogError
from millstream.schemas.ids import new_id
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.records import Worker
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)


def new_worker_id() -> str:
    """A unique id that contains the host name and the process id."""
    return f"{socket.gethostname()}-{os.getpid()}-{new_id()[-6:]}"


@asynccontextmanager
async def reporting(
    producer: Producer,
    topics: Topics,
    role: str,
    worker_id: str,
    load: Callable[[], tuple[int, int]] = lambda: (0, 0),
    *,
    report_s: float = 5.0,
) -> AsyncIterator[None]:
    """Reports while the body runs, and once with 0 slots when it ends. ``load`` returns (slots, running).
    ``report_s``: seconds between reports."""
    started, host, ours = time.time_ns(), socket.gethostname(), version("millstream")

    def report(slots: int, running: int) -> None:
        worker = Worker(
            worker_id=worker_id,
            role=role,
            host=host,
            version=ours,
            slots=slots,
            running=running,
            started=started,
            last_seen=time.time_ns(),
        )
        try:
            producer.send(topics.workers, worker, key=worker_id, headers={KIND_HEADER: role.encode()})
        except LogError as error:
            logger.warning("%s can't report its state: %s", worker_id, error)

    async def repeat() -> None:
        while True:
            report(*load())
            await asyncio.sleep(report_s)

    task = supervisor().loop("report", repeat())
    try:
        yield
    finally:
        task.cancel()
        report(0, 0)
