"""A trainer that waits in vain names the role that is missing."""

import asyncio
import logging

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.training.reporting.waiting import WaitPolicy, missing, watch
from millstream.producers.log.port import closing
from millstream.producers.workers import reporting
from millstream.schemas.config.settings import load_settings
from millstream.schemas.wire.records import Worker

ROLES = ["runner", "proxy", "adapter"]
AT_ONCE = WaitPolicy(look_s=0.01, patience_s=0.0)
SECOND = 10**9


def worker(role: str, seen: int) -> Worker:
    about = {"host": "h", "version": "0", "slots": 1, "running": 0}
    return Worker(worker_id=role, role=role, started=0, last_seen=seen, **about)  # type: ignore[arg-type]


def test_a_role_is_missing_if_none_of_its_processes_is_alive() -> None:
    now = 100 * SECOND
    workers = [worker("runner", now), worker("adapter", now - 60 * SECOND), worker("gateway", now)]
    assert missing(workers, ROLES, now) == ["proxy", "adapter"]
    assert missing([], ROLES, now) == ROLES
    assert missing([*workers, worker("adapter", now), worker("proxy", now)], ROLES, now) == []


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put_nowait(record.getMessage())


async def test_the_missing_role_and_its_command_are_named_once() -> None:
    topics = load_settings().topics
    log, heard = MemoryLog(topics), Heard()
    outstanding = frozenset({"a", "b"})
    logger = logging.getLogger("millstream.pipeline.training.reporting.waiting")
    logger.addHandler(heard)
    watching: asyncio.Task[None] | None = None
    try:
        async with closing(log.producer()) as producer, reporting(producer, topics, "adapter", "adapter-1"):
            watching = asyncio.create_task(watch(log, topics, lambda: outstanding, ROLES, AT_ONCE))
            said = await asyncio.wait_for(heard.lines.get(), 30)
            assert "waiting for 2 rollouts" in said
            assert "no runner is alive: start one with `millstream runner MODULE:AGENT`" in said
            assert "no proxy is alive: start one with `millstream proxy`" in said
            assert "adapter" not in said
            outstanding = frozenset({"b"})  # one has ended: the next silence is said again, and this one was once
            assert "waiting for 1 rollouts" in await asyncio.wait_for(heard.lines.get(), 30)
            assert heard.lines.empty()
    finally:
        logger.removeHandler(heard)
        if watching is not None:
            watching.cancel()


def test_it_is_said_within_half_a_minute() -> None:
    policy = WaitPolicy()
    assert policy.patience_s + 2 * policy.look_s <= 30
