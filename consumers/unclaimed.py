"""The tasks that no runner has claimed, counted as records.

Offsets are no measure of them: a retry's transaction leaves a marker behind its task, which no group ever reads, and an
aborted transaction leaves records that do not count.
"""

from array import array
from bisect import bisect_left
from contextlib import aclosing
from dataclasses import dataclass, field

from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.schemas.wire.log import Partition, age_s
from millstream.schemas.wire.topics import PRIORITIES, Topics


@dataclass(frozen=True, slots=True)
class Unclaimed:
    tasks: dict[str, int]  # by priority
    oldest_s: float  # age of the oldest; 0 without any


@dataclass(slots=True)
class _Waiting:
    """The unclaimed tasks of one partition, 16 bytes each."""

    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    times: "array[int]" = field(default_factory=lambda: array("q"))  # ms since the epoch
    read_to: int = 0  # the next offset to read

    def claimed_to(self, offset: int) -> None:
        """Forgets the tasks before it."""
        claimed = bisect_left(self.offsets, offset)
        del self.offsets[:claimed], self.times[:claimed]
        self.read_to = max(self.read_to, offset)


class UnclaimedTasks:
    """Reads each task once, however often it is asked."""

    def __init__(self, log: Log, topics: Topics) -> None:
        self._log = log
        self._topics = topics
        self._waiting = {
            Partition(topics.tasks(priority), n): _Waiting()
            for priority in PRIORITIES
            for n in range(topics.partitions)
        }

    async def read(self) -> Unclaimed:
        """What waits now. One call at a time. Raises `LogError`."""
        consumer = self._log.consumer(f"{self._topics.prefix}.runner")
        try:
            ends = await consumer.end_offsets(self._waiting)
            first = await consumer.beginning_offsets(self._waiting)
            committed = await consumer.committed(self._waiting)
        finally:
            await consumer.close()
        for partition, end in ends.items():
            if self._waiting[partition].read_to > end:  # the topic was created again
                self._waiting[partition] = _Waiting()
            self._waiting[partition].claimed_to(max(committed[partition] or 0, first[partition]))
        start = {p: waiting.read_to for p, waiting in self._waiting.items() if waiting.read_to < ends[p]}
        if start:
            async with aclosing(read_to_end(self._log, list(start), start)) as records:
                async for record in records:
                    waiting = self._waiting[record.partition]
                    waiting.offsets.append(record.offset)
                    waiting.times.append(record.timestamp)
                    waiting.read_to = record.offset + 1
            for partition in start:  # markers may follow the last task
                waiting = self._waiting[partition]
                waiting.read_to = max(waiting.read_to, ends[partition])
        counts = dict.fromkeys(PRIORITIES, 0)
        for priority in PRIORITIES:
            topic = self._topics.tasks(priority)
            counts[priority] = sum(len(w.offsets) for partition, w in self._waiting.items() if partition.topic == topic)
        oldest = min((waiting.times[0] for waiting in self._waiting.values() if waiting.times), default=None)
        return Unclaimed(counts, age_s(oldest))
