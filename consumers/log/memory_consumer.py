"""The two consumer ports in memory."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from millstream.consumers.log.memory_storage import Group, GroupMetadata, MemoryStorage, Waiter
from millstream.consumers.log.port import RebalanceListener
from millstream.schemas.errors import LogError, TransactionAborted
from millstream.schemas.wire.log import EndOfPartition, LogRecord, Partition


class _MemoryConsumer:
    """What both consumers do. The log's lock guards what they share; callbacks run outside of it, so a listener may
    send."""

    _reports_ends = False  # whether `_poll` returns `EndOfPartition`

    def __init__(self, log: MemoryStorage, group: Group | None) -> None:
        self.polls = log.consumers.add()
        self._log = log
        self._group = group
        self._topics: tuple[str, ...] = ()
        self._listener: RebalanceListener | None = None
        self._joining = False  # subscribed, and not polled yet: the listener does not know its partitions
        self._positions: dict[Partition, int] = {}
        self._turns: deque[Partition] = deque()  # the next to read first
        self._paused: set[Partition] = set()
        self._ended: dict[Partition, int] = {}  # ends that were reported
        self._closed = False

    async def subscribe(self, topics: Sequence[str], listener: RebalanceListener | None = None) -> None:
        group = self._require_group("subscribe")
        if self._topics or self._positions:
            raise LogError("subscribe: this consumer has its partitions already")
        for topic in topics:
            self._log.partition(Partition(topic, 0))
        with self._log.lock:
            group.join(self, topics)
        self._topics, self._listener, self._joining = tuple(topics), listener, True

    async def assign(self, partitions: Sequence[Partition], start: Literal["beginning", "end"] = "beginning") -> None:
        if self._topics:
            raise LogError("assign: this consumer has subscribed")
        with self._log.lock:
            logs = [self._log.partition(p) for p in partitions]
            self._drop(set(self._positions))
            self._add({log.partition: log.stable_end() if start == "end" else 0 for log in logs})

    async def _poll(
        self, max_records: int, timeout_s: float, topics: Iterable[str] | None = None
    ) -> list[LogRecord | EndOfPartition]:
        only = None if topics is None else frozenset(topics)
        deadline = time.monotonic() + timeout_s
        await asyncio.sleep(0)  # a consumer that polls a full log must not starve the rest of its event loop
        if self._closed:
            raise LogError("poll: the consumer is closed")
        if self._joining:
            self._begin()
        while True:
            with self._log.lock:
                batch = self._take(max_records, only)
                left = deadline - time.monotonic()
                if batch or left <= 0:
                    return batch
                waiter = self._watch(only)
            try:
                await waiter.wait(left)
            finally:
                with self._log.lock:
                    self._unwatch(waiter)

    def _begin(self) -> None:
        """Takes over the partitions of the subscribed topics."""
        group = self._require_group("poll")
        self._joining = False
        with self._log.lock:
            partitions = [log.partition for topic in self._topics for log in self._log.partitions[topic]]
            self._add({p: group.offsets.get(p, 0) for p in partitions})
        if self._listener is not None:
            self._listener.on_assign(sorted(partitions))

    def assignment(self) -> frozenset[Partition]:
        return frozenset(self._positions)

    def holds(self, partition: Partition, offset: int) -> bool:
        return offset < self._positions.get(partition, 0)

    def position(self, partition: Partition) -> int | None:
        return self._positions.get(partition)

    async def seek(self, partition: Partition, offset: int) -> None:
        self._require_assigned("seek", [partition])
        end = len(self._log.partition(partition).records)
        if not 0 <= offset <= end:
            raise LogError(f"seek: {partition} has offsets up to {end}, not {offset}")
        self._positions[partition] = offset
        self._ended.pop(partition, None)

    def pause(self, partitions: Iterable[Partition]) -> None:
        partitions = list(partitions)
        self._require_assigned("pause", partitions)
        self._paused.update(partitions)

    def resume(self, partitions: Iterable[Partition]) -> None:
        partitions = list(partitions)
        self._require_assigned("resume", partitions)
        self._paused.difference_update(partitions)

    async def commit(self, offsets: Mapping[Partition, int], timeout_s: float = 10.0) -> None:
        group = self._require_group("commit")
        with self._log.lock:
            # A consumer with partitions of its own choice may commit only while the group has no member.
            refusal = group.refusal(self if self._topics else None, offsets)
            if refusal is not None:
                raise TransactionAborted(f"commit: {refusal}")
            group.offsets |= offsets

    async def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        group = self._require_group("committed")
        with self._log.lock:
            return {p: group.offsets.get(p) for p in partitions}

    async def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return {p: len(self._log.partition(p).records) for p in partitions}

    async def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return {self._log.partition(p).partition: 0 for p in partitions}

    async def offsets_since(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        logs = {p: self._log.partition(p).records for p in partitions}
        return {
            p: next((i for i, r in enumerate(log) if r is not None and r.timestamp >= time_ms), len(log))
            for p, log in logs.items()
        }

    def group_metadata(self) -> Any:
        return GroupMetadata(self._require_group("group_metadata"), self)

    async def close(self) -> None:
        if self._closed:
            return
        try:
            if self._listener is not None and self._positions:
                self._listener.on_revoke(sorted(self._positions))
        finally:
            self._closed = self.polls.closed = True
            self._drop(set(self._positions))
            if self._group is not None:
                with self._log.lock:
                    self._group.leave(self)

    def _require_group(self, call: str) -> Group:
        if self._closed:
            raise LogError(f"{call}: the consumer is closed")
        if self._group is None:
            raise LogError(f"{call} needs a consumer that was made with a group")
        return self._group

    def _require_assigned(self, call: str, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            if partition not in self._positions:
                raise LogError(f"{call}: {partition} is not assigned to this consumer")

    def _add(self, positions: dict[Partition, int]) -> None:
        self._positions |= positions
        self._turns.extend(sorted(positions))

    def _drop(self, partitions: set[Partition]) -> None:
        for partition in partitions:
            self._positions.pop(partition, None)
            self._ended.pop(partition, None)
        self._paused -= partitions
        self._turns = deque(self._positions)

    def _readable(self, only: frozenset[str] | None) -> list[Partition]:
        return [p for p in self._turns if p not in self._paused and (only is None or p.topic in only)]

    def _take(self, room: int, only: frozenset[str] | None) -> list[LogRecord | EndOfPartition]:
        batch: list[LogRecord | EndOfPartition] = []
        for partition in self._readable(only):
            log = self._log.partition(partition)
            position, end = self._positions[partition], log.stable_end()
            while position < end and len(batch) < room:
                chunk = log.records[position : min(end, position + room - len(batch))]
                position += len(chunk)
                batch += [record for record in chunk if record is not None]
            self._positions[partition] = position
            if self._reports_ends and position == end and self._ended.get(partition) != end and len(batch) < room:
                self._ended[partition] = end
                batch.append(EndOfPartition(partition, end))
            if len(batch) >= room:
                # The next poll begins with the partition behind this one: a full partition must not starve the others.
                self._turns.remove(partition)
                self._turns.append(partition)
                break
        return batch

    def _watch(self, only: frozenset[str] | None) -> Waiter:
        waiter = Waiter()
        for partition in self._readable(only):
            self._log.partition(partition).waiters.add(waiter)
        return waiter

    def _unwatch(self, waiter: Waiter) -> None:
        for partition in self._positions:
            self._log.partition(partition).waiters.discard(waiter)


class MemoryConsumer(_MemoryConsumer):
    async def poll(self, max_records: int, timeout_s: float, topics: Iterable[str] | None = None) -> list[LogRecord]:
        with self.polls:
            return cast("list[LogRecord]", await self._poll(max_records, timeout_s, topics))


class MemoryTransactionalConsumer(_MemoryConsumer):
    _reports_ends = True

    async def poll(self, max_records: int, timeout_s: float) -> list[LogRecord | EndOfPartition]:
        with self.polls:
            return await self._poll(max_records, timeout_s)
