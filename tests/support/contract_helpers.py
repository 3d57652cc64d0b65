"""Helpers of the contract tests. Deadlines suit a real broker, where a rebalance takes seconds."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from millstream.consumers.log.port import Consumer, Log, TransactionalConsumer
from millstream.producers.log.port import Producer, TransactionalProducer
from millstream.schemas.wire.codec import decode_as
from millstream.schemas.wire.log import EndOfPartition, LogRecord, Partition
from millstream.schemas.wire.records import Control
from millstream.schemas.wire.topics import Topics

PARTITIONS = 4
MAX_RECORD_BYTES = 1 << 16
DEADLINE_S = 40.0
CALL_S = 20.0
# The in-memory log gives each topic to one member of a group.
SEVERAL_MEMBERS = pytest.mark.parametrize("log", [pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True)


def note(name: str) -> Control:
    """Any record will do; this one is small."""
    return Control(kind="note", name=name, body="{}", created_at=1)


def name_of(record: LogRecord) -> str:
    return decode_as(Control, record.value).name


def names(records: Iterable[LogRecord]) -> list[str]:
    return [name_of(record) for record in records]


def by_partition(records: Iterable[LogRecord]) -> dict[Partition, list[LogRecord]]:
    found: dict[Partition, list[LogRecord]] = {}
    for record in records:
        found.setdefault(record.partition, []).append(record)
    return found


@dataclass
class LogUnderTest:
    """A log with empty topics of its own; closes what it made."""

    kind: str
    log: Log
    topics: Topics
    made: list[Producer] = field(default_factory=list)
    consumers: list[Consumer | TransactionalConsumer] = field(default_factory=list)

    def producer(self) -> Producer:
        self.made.append(producer := self.log.producer())
        return producer

    def transactional_producer(self, name: str = "writer") -> TransactionalProducer:
        """Ready to begin; every older one of that name is fenced."""
        producer = self.log.transactional_producer(f"{self.topics.prefix}.{name}")
        self.made.append(producer)
        producer.init_transactions(30.0)
        return producer

    def consumer(self, group: str | None = None) -> Consumer:
        self.consumers.append(consumer := self.log.consumer(group and f"{self.topics.prefix}.{group}"))
        return consumer

    def transactional_consumer(self, group: str) -> TransactionalConsumer:
        self.consumers.append(consumer := self.log.transactional_consumer(f"{self.topics.prefix}.{group}"))
        return consumer

    @property
    def quiet_s(self) -> float:
        """How long to wait for what must not come."""
        return 1.0 if self.kind == "kafka" else 0.05

    async def close(self) -> None:
        for consumer in self.consumers:
            await consumer.close()
        for producer in self.made:
            producer.close(10.0)


class Ownership:
    """The owner of each partition among a group's members, by their callbacks; records overlaps."""

    def __init__(self) -> None:
        self.owners: dict[Partition, Member] = {}
        self.violations: list[str] = []


class Member:
    """A consumer with the callbacks and records that it got."""

    def __init__(self, consumer: Any, ownership: Ownership | None = None) -> None:
        self.consumer = consumer
        self.owned: set[Partition] = set()
        self.revoked: list[Partition] = []
        self.assignments = 0
        self.metadata: object = None
        self.take_metadata = False
        self.records: list[LogRecord] = []
        self.ends: list[EndOfPartition] = []
        self._ownership = ownership or Ownership()

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        self.assignments += 1
        for partition in partitions:
            other = self._ownership.owners.get(partition)
            if other not in (None, self):
                self._ownership.violations.append(f"{partition} was assigned while another member owned it")
            self._ownership.owners[partition] = self
        self.owned.update(partitions)
        if self.take_metadata:
            self.metadata = self.consumer.group_metadata()

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            if self._ownership.owners.get(partition) is self:
                del self._ownership.owners[partition]
        self.owned.difference_update(partitions)
        self.revoked.extend(partitions)

    async def join(self, *topics: str) -> "Member":
        await self.consumer.subscribe(topics, self)
        return self

    async def poll(self, timeout_s: float = 0.2, max_records: int = 100) -> list[LogRecord]:
        batch = await self.consumer.poll(max_records, timeout_s)
        new = [item for item in batch if isinstance(item, LogRecord)]
        for record in new:
            if record.partition not in self.owned:
                self._ownership.violations.append(f"{record.place} was handed out before on_assign or after on_revoke")
        self.ends += [item for item in batch if isinstance(item, EndOfPartition)]
        self.records += new
        return new


async def poll_until(what: str, condition: Callable[[], object], *members: Member) -> None:
    """Polls all members side by side until the condition holds; ``what`` describes it in a failure."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, (
            f"not within {DEADLINE_S:.0f} s: {what}; owned {[sorted(map(str, m.owned)) for m in members]}, "
            f"handed out {[len(m.records) for m in members]}"
        )
        await asyncio.gather(*(member.poll() for member in members))


async def read(consumer: Consumer, count: int, topics: Iterable[str] | None = None) -> list[LogRecord]:
    """Polls until ``count`` records have come."""
    found: list[LogRecord] = []
    topics = None if topics is None else list(topics)
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {names(found)} of {count} records within {DEADLINE_S:.0f} s"
        found += await consumer.poll(count - len(found), 0.5, topics)
    return found


async def read_ends(consumer: TransactionalConsumer, count: int) -> tuple[list[LogRecord], list[EndOfPartition]]:
    """Polls until ``count`` ends of partitions have been reported."""
    records: list[LogRecord] = []
    ends: list[EndOfPartition] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(ends) < count:
        assert time.monotonic() < deadline, (
            f"the end was reported {len(ends)} times within {DEADLINE_S:.0f} s, not {count}"
        )
        for item in await consumer.poll(100, 0.5):
            if isinstance(item, LogRecord):
                records.append(item)
            else:
                ends.append(item)
    return records, ends


async def read_nothing(log: LogUnderTest, consumer: Consumer, topics: Iterable[str] | None = None) -> None:
    """Fails if a record comes soon."""
    deadline = time.monotonic() + log.quiet_s
    topics = None if topics is None else list(topics)
    while (left := deadline - time.monotonic()) > 0:
        assert names(await consumer.poll(100, left, topics)) == []
