"""The log in memory: partitions, groups, commits and transactions within this process.

For a laptop, a debugger and tests. Records are the frozen objects themselves, so sending one costs a few microseconds.
It keeps the promises of the two ports as Kafka does (`tests/consumers/log/` runs against both) with two differences
that follow from being one process: it is never unavailable, and it holds everything until the process ends.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from itertools import count
from typing import Any

from millstream.consumers.log.memory_consumer import (
    GroupMetadata,
    MemoryConsumer,
    MemoryTransactionalConsumer,
    Waiter,
)
from millstream.consumers.log.memory_group import Group
from millstream.consumers.log.poll_times import OpenConsumers, PollTimes
from millstream.consumers.log.port import Consumer, TransactionalConsumer
from millstream.producers.log.port import LINGER_MS, OnAck, Producer, TransactionalProducer
from millstream.schemas.errors import ConfigError, Fenced, LogError, TooLarge, TransactionAborted
from millstream.schemas.wire.codec import encode as encode_record
from millstream.schemas.wire.log import Headers, LogRecord, Partition
from millstream.schemas.wire.records import Record
from millstream.schemas.wire.topics import Topic, Topics, partition_of

_place = lru_cache(maxsize=1 << 16)(partition_of)  # a rollout's records all ask for the same key; 4 µs each


class MemoryLog:
    """One log (see `consumers.port.Log`), for any number of threads and event loops.

    ``encode`` stores bytes, as Kafka would. ``clock`` counts seconds; a group's member that has not polled for
    ``session_timeout_s`` of them is evicted as soon as another member polls.
    """

    def __init__(
        self,
        topics: Topics,
        *,
        encode: bool = False,
        max_record_bytes: int = 16 << 20,
        clock: Callable[[], float] = time.monotonic,
        session_timeout_s: float = 10.0,
    ) -> None:
        self.encode = encode
        self.max_record_bytes = max_record_bytes
        self.clock = clock
        self.session_timeout_s = session_timeout_s
        self.lock = threading.Lock()  # guards everything below, and the parts of it
        self.counts: dict[str, int] = {}
        self.partitions: dict[str, list[_PartitionLog]] = {}
        self._add(topics.all)
        self.groups: dict[str, Group[MemoryConsumer]] = {}
        self.transactional: dict[str, _MemoryTransactionalProducer] = {}
        self.open = OpenConsumers()

    def producer(self, *, linger_ms: float = LINGER_MS) -> Producer:
        return _MemoryProducer(self)

    def transactional_producer(self, transactional_id: str) -> TransactionalProducer:
        return _MemoryTransactionalProducer(self, transactional_id)

    def consumer(self, group: str | None = None) -> Consumer:
        return MemoryConsumer(self, None if group is None else self._group(group))

    def transactional_consumer(self, group: str) -> TransactionalConsumer:
        return MemoryTransactionalConsumer(self, self._group(group))

    def polls(self) -> list[PollTimes]:
        return self.open.polls()

    def _group(self, name: str) -> Group[MemoryConsumer]:
        with self.lock:
            return self.groups.setdefault(name, Group(name, self.counts))

    async def create_topics(self, more: Sequence[Topic] = ()) -> None:
        """The deployment's own have existed since the log was made."""
        for topic in more:
            if (there := self.counts.get(topic.name, topic.partitions)) != topic.partitions:
                raise ConfigError(f"topic {topic.name} has {there} partitions, not {topic.partitions}")
        self._add(topic for topic in more if topic.name not in self.counts)

    def _add(self, topics: Iterable[Topic]) -> None:
        for topic in topics:
            self.partitions[topic.name] = [_PartitionLog(Partition(topic.name, n)) for n in range(topic.partitions)]
            self.counts[topic.name] = topic.partitions

    async def check(self) -> None:
        """A log in this process always answers."""

    def partition(self, partition: Partition) -> "_PartitionLog":
        """Raises `LogError` if there is no such partition."""
        logs = self.partitions.get(partition.topic)
        if logs is None:
            raise LogError(f"topic {partition.topic} does not exist; this log has {', '.join(self.partitions)}")
        if not 0 <= partition.number < len(logs):
            raise LogError(f"{partition} does not exist: {partition.topic} has {len(logs)} partitions")
        return logs[partition.number]


class _PartitionLog:
    """The records of one partition; a record's index is its offset."""

    __slots__ = ("open", "partition", "records", "waiters")

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.records: list[LogRecord | None] = []  # None where an aborted record was
        self.open: dict[_MemoryTransactionalProducer, int] = {}  # first offset of each open transaction
        self.waiters: set[Waiter] = set()

    def stable_end(self) -> int:
        """Readers of committed records see what lies below: an open transaction holds back all that follows it."""
        return min(self.open.values()) if self.open else len(self.records)

    def wake(self) -> None:
        for waiter in self.waiters:
            waiter.wake()


class _MemoryProducer:
    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._turn = count()
        self._closed = False

    def send(
        self,
        topic: str,
        value: Record | bytes,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers | None = None,
        on_ack: OnAck | None = None,
    ) -> None:
        log = self._log
        if self._closed:
            raise LogError("the producer is closed")
        if partition is None:
            among = log.counts.get(topic, 1)
            partition = next(self._turn) % among if key is None else _place(key, among)
        target = log.partition(Partition(topic, partition))
        if log.encode and not isinstance(value, bytes):
            value = encode_record(value)
        if isinstance(value, bytes) and len(value) > log.max_record_bytes:
            raise TooLarge(
                f"{topic}, key {key}: the record has {len(value):,} bytes, max_record_bytes is {log.max_record_bytes:,}"
            )
        now_ms = time.time_ns() // 1_000_000
        with log.lock:
            offset = len(target.records)
            self._admit(target, offset)
            target.records.append(LogRecord(target.partition, offset, now_ms, key, value, headers or {}))
            if target.waiters and not target.open:
                target.wake()
        if on_ack is not None:
            on_ack(None, offset)

    def _admit(self, target: _PartitionLog, offset: int) -> None:
        """Under the lock, before a record is written."""

    def flush(self, timeout_s: float) -> None:
        """A record is stored as soon as ``send`` returns."""

    def close(self, timeout_s: float = 10.0) -> None:
        self._closed = True


class _State(StrEnum):
    NEW = "init_transactions has not been called"
    READY = "no transaction has begun"
    OPEN = "a transaction is open"
    DOOMED = "the transaction can only be aborted"
    FENCED = "fenced"
    CLOSED = "the producer is closed"


class _MemoryTransactionalProducer(_MemoryProducer):
    def __init__(self, log: MemoryLog, transactional_id: str) -> None:
        super().__init__(log)
        self._id = transactional_id
        self._state = _State.NEW
        self._written: list[tuple[_PartitionLog, int]] = []
        self._offsets: list[tuple[dict[Partition, int], GroupMetadata]] = []

    def init_transactions(self, timeout_s: float) -> None:
        with self._log.lock:
            self._expect("init_transactions", _State.NEW)
            older = self._log.transactional.get(self._id)
            if older is not None:
                older._drop()
                older._state = _State.FENCED
            self._log.transactional[self._id] = self
            self._state = _State.READY

    def begin_transaction(self) -> None:
        with self._log.lock:
            self._expect("begin_transaction", _State.READY)
            self._state = _State.OPEN

    def send_offsets(self, offsets: Mapping[Partition, int], group: Any, timeout_s: float) -> None:
        with self._log.lock:
            self._expect("send_offsets", _State.OPEN)
            self._check(offsets, group)
            self._offsets.append((dict(offsets), group))

    def commit_transaction(self, timeout_s: float) -> None:
        with self._log.lock:
            self._expect("commit_transaction", _State.OPEN)
            for offsets, group in self._offsets:  # all of them before the first takes effect
                self._check(offsets, group)
            for offsets, group in self._offsets:
                group.group.offsets |= offsets
            self._end()

    def abort_transaction(self, timeout_s: float) -> None:
        with self._log.lock:
            self._expect("abort_transaction", _State.OPEN, _State.DOOMED)
            self._drop()
            self._state = _State.READY

    def flush(self, timeout_s: float) -> None:
        if self._state is _State.FENCED:
            self._expect("flush")

    def close(self, timeout_s: float = 10.0) -> None:
        with self._log.lock:
            if self._log.transactional.get(self._id) is self:
                self._drop()
                del self._log.transactional[self._id]
            self._state = _State.CLOSED

    def _admit(self, target: _PartitionLog, offset: int) -> None:
        self._expect("send", _State.OPEN)
        target.open.setdefault(self, offset)
        self._written.append((target, offset))

    def _expect(self, call: str, *states: _State) -> None:
        if self._state in states:
            return
        if self._state is _State.FENCED:
            raise Fenced(f"{call}: a newer producer has taken transactional id {self._id}")
        if self._state is _State.DOOMED:
            raise TransactionAborted(f"{call}: {self._state}")
        raise LogError(f"{call}: {self._state}")

    def _check(self, offsets: Iterable[Partition], group: GroupMetadata) -> None:
        refusal = group.group.refusal(group.member, offsets, group.epoch)
        if refusal is not None:
            self._state = _State.DOOMED
            raise TransactionAborted(refusal)

    def _drop(self) -> None:
        """Takes back what the open transaction wrote."""
        for target, offset in self._written:
            target.records[offset] = None
        self._end()

    def _end(self) -> None:
        touched = {target for target, _ in self._written}
        for target in touched:
            del target.open[self]
            target.wake()
        self._written.clear()
        self._offsets.clear()
        self._state = _State.READY
