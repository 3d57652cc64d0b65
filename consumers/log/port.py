"""The consumer ports, and the port of a log: how roles read, whichever log is used."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from millstream.consumers.log.poll_times import PollTimes, Traffic
from millstream.producers.log.port import LINGER_MS, Producer, TransactionalProducer
from millstream.schemas.wire.log import EndOfPartition, LogRecord, Partition
from millstream.schemas.wire.topics import Topic


class RebalanceListener(Protocol):
    """Hears of assignments within ``poll`` or another call of the consumer; from `AioConsumer` also between two calls,
    at an await of the event loop. Callbacks are synchronous: the state of a partition must exist before its first
    record is handed out, and must be dropped when the partition is lost."""

    def on_assign(self, partitions: Sequence[Partition]) -> None: ...

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        """Partitions are lost, gracefully or not: the consumer may not commit them any more."""


class GroupMember(Protocol):
    """Reads committed records only, each partition in its order. One task at a time.

    Every call may raise `LogUnavailable`. Handing a record out does not commit it.
    """

    polls: PollTimes

    async def subscribe(self, topics: Sequence[str], listener: RebalanceListener | None = None) -> None:
        """Joins the group given at creation. Starts at committed offsets; without one, at the beginning."""

    async def seek(self, partition: Partition, offset: int) -> None: ...

    async def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """High watermarks: one past the last record, including open transactions (unlike the last stable offset)."""

    async def close(self) -> None:
        """Leaves the group gracefully (calls ``on_revoke``); commits nothing."""


class Consumer(GroupMember, Protocol):
    """Commits its own offsets, or reads without a group."""

    async def assign(self, partitions: Sequence[Partition], start: Literal["beginning", "end"] = "beginning") -> None:
        """Reads these partitions without joining a group. Use ``seek`` for other positions."""

    async def poll(self, max_records: int, timeout_s: float, topics: Iterable[str] | None = None) -> list[LogRecord]:
        """Up to ``max_records``, as soon as there are any; empty at the deadline. ``topics`` restricts the call to some
        topics. A rebalance may extend the call beyond its deadline."""

    def assignment(self) -> frozenset[Partition]: ...

    def holds(self, partition: Partition, offset: int) -> bool:
        """Whether this record was handed out since the last rebalance. If not, another member may have handled it, even
        if the partition has come back."""

    def position(self, partition: Partition) -> int | None:
        """Offset of the next record of ``poll``; None until it is known."""

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Holds records back until ``resume``. A newly assigned partition is resumed."""

    def resume(self, partitions: Iterable[Partition]) -> None: ...

    async def commit(self, offsets: Mapping[Partition, int], timeout_s: float = 10.0) -> None:
        """Commits the group's next offsets. Raises `TransactionAborted` if a record before one of them is not held, and
        `LogUnavailable` at the deadline."""

    async def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]: ...

    async def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]: ...

    async def offsets_since(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """The first offset of each partition with a timestamp of at least ``time_ms``; its end if there is none."""


class TransactionalConsumer(GroupMember, Protocol):
    """A group member whose offsets a transactional producer commits."""

    async def poll(self, max_records: int, timeout_s: float) -> list[LogRecord | EndOfPartition]:
        """Includes an `EndOfPartition` whenever an end is reached."""

    def group_metadata(self) -> Any:
        """The argument of ``send_offsets``; take it in ``on_assign``."""


class Log(Protocol):
    """A log: creates its producers and consumers."""

    def producer(self, *, linger_ms: float = LINGER_MS, room_s: float | None = None) -> Producer:
        """``linger_ms``: how long a record may wait for others to share its request. ``room_s``: how long a sender
        waits while the buffer is full; 0 for one that sends from an event loop, a minute by default."""

    def transactional_producer(self, transactional_id: str) -> TransactionalProducer:
        """``transactional_id`` is stable per replica: a restarted process fences its own predecessor."""

    def consumer(self, group: str | None = None) -> Consumer: ...

    def transactional_consumer(self, group: str) -> TransactionalConsumer: ...

    def polls(self) -> list[PollTimes]:
        """The poll times of every consumer that this object has made and that is not closed. Any thread may call it."""

    def traffic(self) -> Traffic:
        """What all its clients have read and written. Any thread may call it."""

    async def create_topics(self, more: Sequence[Topic] = ()) -> None:
        """Creates the missing topics of the deployment and of ``more``. Raises `ConfigError` if a topic that is
        partitioned like the events (events, triplets, ``more``) has another number of partitions."""

    async def check(self) -> None:
        """Raises `LogUnavailable` within 10 s if the log does not answer, and `ConfigError` if a setting is wrong or
        topics do not match the settings. The error says what to do."""
