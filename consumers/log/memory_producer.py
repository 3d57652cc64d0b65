"""The two producer ports in memory."""

import time
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache
from itertools import count
from typing import Any

from millstream.consumers.log.memory_storage import GroupMetadata, MemoryStorage, PartitionLog
from millstream.producers.log.port import OnAck
from millstream.schemas.errors import Fenced, LogError, TooLarge, TransactionAborted
from millstream.schemas.wire.codec import encode as encode_record
from millstream.schemas.wire.log import Headers, LogRecord, Partition
from millstream.schemas.wire.records import Record
from millstream.schemas.wire.topics import partition_of

_partition_of = lru_cache(maxsize=1 << 16)(partition_of)  # all records of a rollout have the same key


class MemoryProducer:
    """A record is stored when ``send`` returns."""

    def __init__(self, log: MemoryStorage) -> None:
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
            count = len(log.partitions.get(topic, (None,)))
            partition = next(self._turn) % count if key is None else _partition_of(key, count)
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

    def _admit(self, target: PartitionLog, offset: int) -> None:
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


class MemoryTransactionalProducer(MemoryProducer):
    """A newer producer with the same transactional id fences this one."""

    def __init__(self, log: MemoryStorage, transactional_id: str) -> None:
        super().__init__(log)
        self._id = transactional_id
        self._state = _State.NEW
        self._written: list[tuple[PartitionLog, int]] = []
        self._offsets: list[tuple[dict[Partition, int], GroupMetadata]] = []

    def init_transactions(self, timeout_s: float) -> None:
        with self._log.lock:
            self._expect("init_transactions", _State.NEW)
            older = self._log.fences.get(self._id)
            if isinstance(older, MemoryTransactionalProducer):
                older._drop()
                older._state = _State.FENCED
            self._log.fences[self._id] = self
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
            if self._log.fences.get(self._id) is self:
                self._drop()
                del self._log.fences[self._id]
            self._state = _State.CLOSED

    def _admit(self, target: PartitionLog, offset: int) -> None:
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
        refusal = group.group.refusal(group.member, offsets)
        if refusal is not None:
            self._state = _State.DOOMED
            raise TransactionAborted(refusal)

    def _drop(self) -> None:
        """Removes what the open transaction wrote."""
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
