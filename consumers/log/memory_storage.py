"""What an in-memory log holds: the records of its partitions, and its groups with their offsets."""

import asyncio
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from millstream.consumers.log.poll_times import OpenConsumers
from millstream.schemas.errors import LogError
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.topics import Topic


class Waiter:
    """A poll that waits in its event loop; any thread may wake it."""

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


class PartitionLog:
    """The records of one partition; a record's index is its offset."""

    __slots__ = ("open", "partition", "records", "waiters")

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.records: list[LogRecord | None] = []  # None where an aborted record was
        self.open: dict[object, int] = {}  # producer → first offset of its open transaction
        self.waiters: set[Waiter] = set()

    def stable_end(self) -> int:
        """Readers of committed records see what lies below: an open transaction holds back everything behind it."""
        return min(self.open.values()) if self.open else len(self.records)

    def wake(self) -> None:
        for waiter in self.waiters:
            waiter.wake()


@dataclass(slots=True)
class Group:
    """A consumer group. One member reads a topic: it owns all partitions, and there are no rebalances."""

    name: str
    offsets: dict[Partition, int] = field(default_factory=dict)
    owners: dict[str, object] = field(default_factory=dict)  # topic → consumer

    def join(self, member: object, topics: Collection[str]) -> None:
        """Raises `LogError` if another member reads one of the topics."""
        taken = [topic for topic in topics if topic in self.owners]
        if taken:
            raise LogError(
                f"group {self.name} already reads {taken[0]}: a group of the in-memory log has one member a topic; "
                "several need Kafka"
            )
        self.owners |= dict.fromkeys(topics, member)

    def leave(self, member: object) -> None:
        self.owners = {topic: owner for topic, owner in self.owners.items() if owner is not member}

    def refusal(self, member: object | None, partitions: Iterable[Partition]) -> str | None:
        """Why ``member`` may not commit these partitions, or None. ``member`` None: a consumer that did not join."""
        for partition in partitions:
            if self.owners.get(partition.topic) is not member:
                return f"{partition} does not belong to this member of group {self.name}"
        return None


class GroupMetadata(NamedTuple):
    """What a transaction needs to commit offsets: the group and the member that has read the records."""

    group: Group
    member: object


class MemoryStorage:
    """Everything that producers and consumers of one log share."""

    def __init__(self, topics: Iterable[Topic], *, encode: bool, max_record_bytes: int) -> None:
        self.encode = encode
        self.max_record_bytes = max_record_bytes
        self.lock = threading.Lock()  # guards everything below
        self.partitions: dict[str, list[PartitionLog]] = {}
        self.groups: dict[str, Group] = {}
        self.fences: dict[str, object] = {}  # transactional id → its newest producer
        self.consumers = OpenConsumers()
        self.add(topics)

    def add(self, topics: Iterable[Topic]) -> None:
        for topic in topics:
            self.partitions[topic.name] = [PartitionLog(Partition(topic.name, n)) for n in range(topic.partitions)]

    def partition(self, partition: Partition) -> PartitionLog:
        """Raises `LogError` if it does not exist."""
        logs = self.partitions.get(partition.topic)
        if logs is None:
            raise LogError(f"topic {partition.topic} does not exist; this log has {', '.join(self.partitions)}")
        if not 0 <= partition.number < len(logs):
            raise LogError(f"{partition} does not exist: {partition.topic} has {len(logs)} partitions")
        return logs[partition.number]

    def group(self, name: str) -> Group:
        with self.lock:
            return self.groups.setdefault(name, Group(name))
