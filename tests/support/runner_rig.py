"""A runner on a log in memory, the agents that tests give it, and what it wrote."""

import asyncio
import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Log
from millstream.consumers.runner.runner import Runner
from millstream.producers.tasks import TaskLine, TaskPublisher, group_of
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutTask, Span

WAIT_S = 60.0


def settings_for_tests(**overrides: Any) -> Settings:
    return load_settings(**{"proxy_url": "", "topic_prefix": "t", "kafka_partitions": 4, **overrides})


def write_agent(folder: Path, code: str, name: str = "my_agent.py") -> Path:
    (folder / name).write_text(textwrap.dedent(code), "utf-8")
    return folder


async def until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds, which nothing announces."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@dataclass
class Rig:
    """Publishes tasks and reads events."""

    log: Log
    settings: Settings
    records: list[LogRecord] = field(default_factory=list)
    runner: "asyncio.Task[None] | None" = None

    async def publish(self, inputs: Iterable[Any], experiment_id: str = "", **fields: Any) -> list[RolloutTask]:
        lines = [TaskLine(input=x, **fields) for x in inputs]
        tasks = [t for line in lines for t in group_of(line, self.settings, experiment_id=experiment_id)]
        await self.publish_tasks(tasks)
        return tasks

    async def publish_tasks(self, tasks: Iterable[RolloutTask]) -> None:
        await TaskPublisher(self.log.producer(), self.settings).publish(tasks)

    async def read_until(self, done: Callable[[list[Any]], bool]) -> list[Any]:
        """All events so far (decoded), as soon as ``done`` says so of them."""
        topics = self.settings.topics
        consumer = self.log.consumer()
        await consumer.assign([Partition(topics.events, n) for n in range(topics.partitions)])
        events: list[Any] = []
        self.records = []
        try:
            async with asyncio.timeout(WAIT_S):
                while not done(events):
                    if self.runner is not None and self.runner.done():
                        self.runner.result()
                    for record in await consumer.poll(1000, 0.5):
                        assert isinstance(record, LogRecord)
                        self.records.append(record)
                        events.append(codec.decode(record.value))
        finally:
            await consumer.close()
        return events

    async def everything(self) -> list[Any]:
        """All that lies on the events topic now."""
        topics = self.settings.topics
        consumer = self.log.consumer()
        ends = await consumer.end_offsets([Partition(topics.events, n) for n in range(topics.partitions)])
        await consumer.close()
        return await self.read_until(lambda events: len(events) >= sum(ends.values()))

    async def ends(self, n: int) -> "dict[str, Ended]":
        """By input (JSON), when ``n`` attempts have ended."""
        return by_input(await self.read_until(lambda events: len(terminal(events)) >= n))


@dataclass
class Ended:
    """One attempt as it is in the log."""

    task: RolloutTask
    events: list[AttemptEvent]
    spans: list[Span]
    order: list[str]  # statuses and kinds as they lie in the log

    @property
    def last(self) -> AttemptEvent:
        return self.events[-1]

    @property
    def rewards(self) -> list[float | None]:
        return [s.reward for s in self.spans if s.kind == "reward"]


def terminal(events: Iterable[Any]) -> list[AttemptEvent]:
    return [e for e in events if isinstance(e, AttemptEvent) and e.status in status.TERMINAL]


def by_input(events: Iterable[Any]) -> dict[str, Ended]:
    """The attempt that ran, of each task. A claim abandoned in a rebalance leaves only a ``preparing``."""
    attempts: dict[str, Ended] = {}
    for event in events:
        if isinstance(event, AttemptEvent):
            if event.status == status.PREPARING:
                assert event.task is not None
                attempts[event.attempt_id] = Ended(codec.decode_as(RolloutTask, event.task), [], [], [])
            attempts[event.attempt_id].events.append(event)
            attempts[event.attempt_id].order.append(event.status)
        elif isinstance(event, Span):
            attempt = attempts[event.attempt_id]
            assert event.rollout_id == attempt.task.rollout_id
            attempt.spans.append(event)
            attempt.order.append(event.kind)
    ran = [attempt for attempt in attempts.values() if len(attempt.events) > 1]
    found = {attempt.task.input: attempt for attempt in ran}
    assert len(found) == len(ran), "a task ran twice"
    return found


def assert_whole(ended: Mapping[str, Ended]) -> None:
    """Every attempt has one end, behind all of its spans, which are as many as it says."""
    for one in ended.values():
        assert one.order[0] == "preparing"
        assert one.order[-1] in status.TERMINAL
        assert sum(s in status.TERMINAL for s in one.order) == 1
        assert one.last.span_counts.get("agent") == len(one.spans)
        assert Counter(s.sequence for s in one.spans) == Counter(range(1, len(one.spans) + 1))


@asynccontextmanager
async def running(
    agent: Any, folder: Path | None = None, *, log: Log | None = None, settings: Settings | None = None, **options: Any
) -> AsyncIterator[Rig]:
    """A running runner. At the end it is stopped, and its exception raised."""
    settings = settings or settings_for_tests()
    rig = Rig(log or MemoryLog(settings.topics), settings)
    stop = asyncio.Event()
    runner = Runner(rig.log, settings, agent, folder=folder, **options)
    rig.runner = asyncio.create_task(runner.run(stop))
    try:
        yield rig
    finally:
        stop.set()
        await asyncio.wait_for(rig.runner, WAIT_S)
