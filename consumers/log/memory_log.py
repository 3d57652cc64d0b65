"""The log in memory: partitions, commits and transactions within this process.

For a laptop, a debugger and tests. Records are the frozen objects themselves, so sending one costs a few microseconds.
It keeps the promises of the ports as Kafka does (`tests/consumers/log/` runs against both), except that it is never
unavailable, holds everything until the process ends, and gives each topic to one member of a group.
"""

from collections.abc import Sequence

from millstream.consumers.log.memory_consumer import MemoryConsumer, MemoryTransactionalConsumer
from millstream.consumers.log.memory_producer import MemoryProducer, MemoryTransactionalProducer
from millstream.consumers.log.memory_storage import MemoryStorage
from millstream.consumers.log.poll_times import PollTimes, Traffic
from millstream.consumers.log.port import Consumer, TransactionalConsumer
from millstream.producers.log.port import LINGER_MS, Producer, TransactionalProducer
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.topics import Topic, Topics


class MemoryLog(MemoryStorage):
    """One log (see `consumers.log.port.Log`), for any number of threads and event loops. ``encode`` stores bytes, as
    Kafka would."""

    def __init__(self, topics: Topics, *, encode: bool = False, max_record_bytes: int = 16 << 20) -> None:
        super().__init__(topics.all, encode=encode, max_record_bytes=max_record_bytes)

    def producer(self, *, linger_ms: float = LINGER_MS, room_s: float | None = None) -> Producer:
        return MemoryProducer(self)

    def transactional_producer(self, transactional_id: str) -> TransactionalProducer:
        return MemoryTransactionalProducer(self, transactional_id)

    def consumer(self, group: str | None = None) -> Consumer:
        return MemoryConsumer(self, None if group is None else self.group(group))

    def transactional_consumer(self, group: str) -> TransactionalConsumer:
        return MemoryTransactionalConsumer(self, self.group(group))

    def polls(self) -> list[PollTimes]:
        return self.consumers.polls()

    def traffic(self) -> Traffic:
        """Nothing: records are the objects themselves."""
        return self.consumers.traffic()

    async def create_topics(self, more: Sequence[Topic] = ()) -> None:
        """The deployment's own topics have existed since the log was made."""
        for topic in more:
            existing = len(self.partitions.get(topic.name, ()))
            if existing and existing != topic.partitions:
                raise ConfigError(f"topic {topic.name} has {existing} partitions, not {topic.partitions}")
        self.add(topic for topic in more if topic.name not in self.partitions)

    async def check(self) -> None:
        """A log in this process always answers."""
