"""The log-consumer port, and the log itself: what a role needs to read, whichever log it is."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from millstream.consumers.log.poll_times import PollTimes
from millstream.producers.log.port import LINGER_MS, Producer, TransactionalProducer
from millstream.schemas.wire.log import EndOfPartition, LogRecord, Partition
from millstream.schemas.wire.topics import Topic


class RebalanceListener(Protocol):
    """Told of assignments, within ``poll`` or another call of the consumer; by `AioConsumer` also between two calls, at
    an await of the event loop. Callbacks are synchronous: state for a partition must exist before its first record is
    handed out, and must not be dropped later than its loss."""

    def on_assign(self, partitions: Sequence[Partition]) -> None: ...

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        """Taken away, in good order or not: nothing may be committed for them any more."""


class Consumer(Protocol):
    """Reads committed records only, each partition in its order. One task at a time.

    Every call may raise `LogUnavailable`. A record that has been handed out is not committed by that.
    """

    polls: PollTimes

    async def subscribe(self, topics: Sequence[str], listener: RebalanceListener | None = None) -> None:
        """Joins the group given at creation; starts at its committed offsets, without one at the beginning."""

    async def assign(self, partitions: Sequence[Partition], start: Literal["beginning", "end"] = "beginning") -> None:
        """Reads these partitions, without a group. Use ``seek`` for other positions."""

    async def poll(self, max_records: int, timeout_s: float, topics: Iterable[str] | None = None) -> list[LogRecord]:
        """Up to ``max_records``; returns as soon as there are any, or empty at the deadline. ``topics`` restricts the
        call to some of the topics. A rebalance may make the call last longer than its deadline."""

    def assignment(self) -> frozenset[Partition]: ...

    def position(self, partition: Partition) -> int | None:
        """Offset of the next record that ``poll`` would hand out; None until it is known."""

    async def seek(self, partition: Partition, offset: int) -> None: ...

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Holds records back until ``resume``; a new assignment of a partition begins resumed."""

    def resume(self, partitions: Iterable[Partition]) -> None: ...

    async def commit(self, offsets: Mapping[Partition, int], timeout_s: float = 10.0) -> None:
        """Commits next offsets for the group. Raises `TransactionAborted` if a partition has been lost: the records
        belong to another member now; and `LogUnavailable` at the deadline."""

    async def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]: ...

    async def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """High watermarks: one past the last record, open transactions included (a reader of committed records alone
        would see the last stable offset)."""

    async def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]: ...

    async def offsets_since(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """The first offset of each partition with a timestamp of at least ``time_ms``; its end if there is none."""

    async def close(self) -> None:
        """Leaves the group in good order (``on_revoke`` is called); commits nothing."""


class TransactionalConsumer(Protocol):
    """A group's member whose offsets a transactional producer commits; what it shares with `Consumer` is the same."""

    polls: PollTimes

    async def subscribe(self, topics: Sequence[str], listener: RebalanceListener | None = None) -> None: ...

    async def poll(self, max_records: int, timeout_s: float) -> list[LogRecord | EndOfPartition]:
        """`EndOfPartition` comes each time that the end is reached."""

    async def seek(self, partition: Partition, offset: int) -> None: ...

    async def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]: ...

    def group_metadata(self) -> Any:
        """What ``send_offsets`` needs; take it in ``on_assign``."""

    async def close(self) -> None: ...


class Log(Protocol):
    """One log: the maker of its producers and consumers."""

    def producer(self, *, linger_ms: float = LINGER_MS) -> Producer:
        """``linger_ms``: how long a record may wait for others to share a request with."""

    def transactional_producer(self, transactional_id: str) -> TransactionalProducer:
        """``transactional_id`` is stable per replica: a restarted process fences its own predecessor."""

    def consumer(self, group: str | None = None) -> Consumer: ...

    def transactional_consumer(self, group: str) -> TransactionalConsumer: ...

    def polls(self) -> list[PollTimes]:
        """The poll times of every consumer that this object has made and that is not closed. Any thread may call it."""

    async def create_topics(self, more: Sequence[Topic] = ()) -> None:
        """Creates what is missing of the deployment's topics, and of ``more``. Raises `ConfigError` if one whose
        records lie where their rollout's events do (events, triplets, ``more``) exists with another number of
        partitions than it should."""

    async def check(self) -> None:
        """Raises `LogUnavailable` within 10 s, saying what to do, unless the log answers; and `ConfigError` where it is
        a setting that keeps us out, or its topics do not exist as the settings say."""
