"""The two consumer ports in memory."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from millstream.consumers.log.memory_group import Group
from millstream.consumers.log.port import RebalanceListener
from millstream.schemas.errors import LogError, TransactionAborted
from millstream.schemas.wire.log import EndOfPartition, LogRecord, Partition

if TYPE_CHECKING:
    from millstream.consumers.log.memory_log import MemoryLog


class Waiter:
    """A poll that waits in its event loop; anyone may wake it."""

    __slots__ = ("_future", "_loop", "_woken")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()
        self._woken = False

    def wake(self) -> None:
        """From any thread that holds the log's lock."""
        if not self._woken and not self._loop.is_closed():
            self._woken = True  # one wake-up for a burst of records
            self._loop.call_soon_threadsafe(self._settle)

    async def wait(self, timeout_s: float) -> None:
        timer = self._loop.call_later(timeout_s, self._settle)
        try:
            await self._future
        finally:
            timer.cancel()

    def _settle(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


@dataclass(frozen=True, slots=True, eq=False)
class GroupMetadata:
    """A member as it was at one epoch of its group."""

    group: Group["MemoryConsumer"]
    member: "MemoryConsumer"
    epoch: int


class MemoryConsumer:
    """One consumer (see `consumers.port.Consumer`). What it shares with others is guarded by the log's lock; callbacks
    run outside of it, so a listener may send."""

    _eof = False  # whether `_poll` tells the ends of partitions

    def __init__(self, log: "MemoryLog", group: Group["MemoryConsumer"] | None) -> None:
        self.polls = log.open.add()
        self._log = log
        self._group = group
        self._topics: tuple[str, ...] = ()
        self._listener: RebalanceListener | None = None
        self._seen: int | None = None  # the group's epoch at which there was nothing left to do for this member
        self._joining = True  # the listener has to be told, even of no partitions
        self._positions: dict[Partition, int] = {}
        self._turns: deque[Partition] = deque()  # whose turn it is to be read first
        self._paused: set[Partition] = set()
        self._ended: dict[Partition, int] = {}  # where the end was told
        self._waiter: Waiter | None = None
        self._closed = False

    async def subscribe(self, topics: Sequence[str], listener: RebalanceListener | None = None) -> None:
        group = self._require_group("subscribe")
        if self._topics or self._positions:
            raise LogError("subscribe: this consumer has its partitions already")
        for topic in topics:
            self._log.partition(Partition(topic, 0))
        self._topics, self._listener = tuple(topics), listener
        with self._log.lock:
            group.join(self, topics, self._log.clock() + self._log.session_timeout_s)
            self._wake_members()

    async def assign(self, partitions: Sequence[Partition], start: Literal["beginning", "end"] = "beginning") -> None:
        if self._topics:
            raise LogError("assign: this consumer has subscribed")
        with self._log.lock:
            logs = [self._log.partition(p) for p in partitions]
            self._drop(set(self._positions))
            self._add({log.partition: log.stable_end() if start == "end" else 0 for log in logs})

    async def poll(self, max_records: int, timeout_s: float, topics: Iterable[str] | None = None) -> list[LogRecord]:
        with self.polls:
            return cast("list[LogRecord]", await self._poll(max_records, timeout_s, topics))

    async def _poll(
        self, max_records: int, timeout_s: float, topics: Iterable[str] | None = None
    ) -> list[LogRecord | EndOfPartition]:
        only = None if topics is None else frozenset(topics)
        deadline = time.monotonic() + timeout_s
        await asyncio.sleep(0)  # who polls a full log must not keep the rest of its event loop waiting
        self._stay(math.inf)
        try:
            while True:
                self._rebalance()
                with self._log.lock:
                    batch = self._take(max_records, only)
                    left = deadline - time.monotonic()
                    if batch or left <= 0:
                        return batch
                    waiter = self._watch(only)
                    wake_in = min(left, self._next_eviction())
                try:
                    await waiter.wait(wake_in)
                finally:
                    with self._log.lock:
                        self._unwatch(waiter)
        finally:
            self._stay(self._log.clock() + self._log.session_timeout_s)

    def assignment(self) -> frozenset[Partition]:
        return frozenset(self._positions)

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
            if self._topics:
                refusal = group.refusal(self, offsets)
            else:  # partitions of its own choice: only while nobody shares them out
                refusal = f"group {group.name} has members" if group.members else None
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
        group = self._require_group("group_metadata")
        with self._log.lock:
            return GroupMetadata(group, self, group.epoch)

    async def close(self) -> None:
        if self._closed:
            return
        try:
            self._revoke(set(self._positions))
        finally:
            self._closed = self.polls.closed = True
            if self._group is not None:
                with self._log.lock:
                    self._group.leave(self)
                    self._wake_members()

    def _require_group(self, call: str) -> Group["MemoryConsumer"]:
        if self._closed:
            raise LogError(f"{call}: the consumer is closed")
        if self._group is None:
            raise LogError(f"{call} needs a consumer that was made with a group")
        return self._group

    def _require_assigned(self, call: str, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            if partition not in self._positions:
                raise LogError(f"{call}: {partition} is not assigned to this consumer")

    def _stay(self, expires: float) -> None:
        if self._closed:
            raise LogError("poll: the consumer is closed")
        if self._group is not None:
            with self._log.lock:
                self._group.keep(self, expires)

    def _rebalance(self) -> None:
        """Gives up, and takes over, what the group says; the listener is told outside the lock."""
        group = self._group
        if group is None or not self._topics:
            return
        with self._log.lock:
            if group.evict(self._log.clock()):
                self._wake_members()
            if group.epoch == self._seen:
                return
            revoked = self._positions.keys() - group.owned(self) | group.to_release(self)
        self._revoke(revoked)
        with self._log.lock:
            group.release(self, revoked)
            evicted = self not in group.members
            if evicted:
                group.join(self, self._topics, math.inf)
            granted = group.claim(self)
            self._add({p: group.offsets.get(p, 0) for p in granted})
            # Somebody may have joined since the lock was released: then there is more to give up.
            self._seen = None if group.to_release(self) else group.epoch
            if revoked or evicted:
                self._wake_members()
        if self._listener is not None and (granted or evicted or self._joining):
            self._joining = False
            self._listener.on_assign(sorted(granted))

    def _revoke(self, partitions: set[Partition]) -> None:
        if partitions:
            if self._listener is not None:
                self._listener.on_revoke(sorted(partitions))
            self._drop(partitions)

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
            if self._eof and position == end and self._ended.get(partition) != end and len(batch) < room:
                self._ended[partition] = end
                batch.append(EndOfPartition(partition, end))
            if len(batch) >= room:
                # The next poll begins behind this one, so that a full partition can't starve the others.
                self._turns.remove(partition)
                self._turns.append(partition)
                break
        return batch

    def _watch(self, only: frozenset[str] | None) -> Waiter:
        self._waiter = Waiter()
        for partition in self._readable(only):
            self._log.partition(partition).waiters.add(self._waiter)
        if self._group is not None and self._group.epoch != self._seen and self._topics:
            self._waiter.wake()  # the group has changed since `_rebalance` looked
        return self._waiter

    def _unwatch(self, waiter: Waiter) -> None:
        self._waiter = None
        for partition in self._positions:
            self._log.partition(partition).waiters.discard(waiter)

    def _next_eviction(self) -> float:
        """Seconds until another member may count as dead."""
        if self._group is None:
            return math.inf
        return max(0.0, self._group.next_expiry() - self._log.clock())

    def _wake_members(self) -> None:
        if self._group is not None:
            for member in self._group.members:
                if member is not self and member._waiter is not None:
                    member._waiter.wake()


class MemoryTransactionalConsumer(MemoryConsumer):
    """See `consumers.port.TransactionalConsumer`."""

    _eof = True

    async def poll(self, max_records: int, timeout_s: float) -> list[LogRecord | EndOfPartition]:  # type: ignore[override]
        with self.polls:
            return await self._poll(max_records, timeout_s)
