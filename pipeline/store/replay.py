"""Runs a replay: recorded events from the log, through `consumers.adapter.replay`, into a new topic."""

import asyncio
import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from millstream.consumers.adapter.decision import without_triplets
from millstream.consumers.adapter.replay import Replay, Replayed
from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import Progress, read_to_end
from millstream.producers.log.acks import Acks
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import KIND_HEADER, LogRecord, Partition
from millstream.schemas.wire.topics import Topic, Topics

ROOM: Final = 1024  # bytes for key and headers, beside a record's body
FLUSH_S: Final = 60.0  # how long the last records may take to be acknowledged


@dataclass(frozen=True, slots=True)
class Start:
    """Where a replay begins; rollouts that were claimed before are left out."""

    offsets: Mapping[int, int] = field(default_factory=dict)  # by partition number; 0 for the others
    time_ms: int = 0  # since the epoch

    @classmethod
    def parse(cls, text: str) -> "Start":
        """``0:120,1:340`` (partition:offset) or a time, ``2027-01-15T08:00`` (UTC by default)."""
        if re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
            pairs = (part.split(":") for part in text.split(","))
            return cls(offsets={int(number): int(offset) for number, offset in pairs})
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(
                f"--from {text!r} is neither offsets (partition:offset), like 0:120,1:340, nor a time, like "
                "2027-01-15T08:00"
            ) from None
        return cls(time_ms=int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000))

    def covers(self, record: LogRecord) -> bool:
        return record.timestamp >= self.time_ms and record.offset >= self.offsets.get(record.partition.number, 0)


@dataclass(slots=True)
class ReplaySummary:
    """What a replay has written, and what it has left out."""

    rollouts: int = 0
    triplets: int = 0
    trainable: int = 0  # triplets
    rewards: list[float] = field(default_factory=list)  # of rollouts that have one
    incomplete: int = 0  # rollouts that ended, but whose beginning the log no longer holds or `Start` leaves out
    open: int = 0  # rollouts that have not ended yet
    unreadable: int = 0  # records

    def add(self, replayed: Replayed) -> None:
        self.rollouts += 1
        self.triplets += len(replayed.triplets)
        self.trainable += sum(triplet.trainable for triplet in replayed.triplets)
        if replayed.end.reward is not None:
            self.rewards.append(replayed.end.reward)


class TopicOutput:
    """Writes each rollout to the partition of its events, as the adapter does; complete once ``close`` returns."""

    def __init__(self, log: Log, topic: str, max_record_bytes: int) -> None:
        self._producer = log.producer()
        self._sent = Acks(self._producer)
        self._topic = topic
        self._limit = max_record_bytes - ROOM

    def write(self, replayed: Replayed) -> None:
        end, triplets = replayed.end, [codec.encode(triplet) for triplet in replayed.triplets]
        if (size := max(map(len, triplets), default=0)) > self._limit:
            end = without_triplets(end, f"too_large: a triplet of {size:,} bytes; raise max_record_bytes")
            triplets = []
        for value, kind in [*((triplet, b"triplet") for triplet in triplets), (codec.encode(end), b"end")]:
            headers = {KIND_HEADER: kind}
            self._sent.send(self._topic, value, key=end.rollout_id, partition=replayed.partition, headers=headers)

    async def close(self) -> None:
        """Raises `LogError` if a record was refused."""
        await asyncio.to_thread(self._producer.close, FLUSH_S)
        await self._sent.wait()


async def run_replay(
    log: Log,
    topics: Topics,
    replay: Replay,
    output: TopicOutput,
    start: Start | None = None,
    progress: Progress | None = None,
) -> ReplaySummary:
    """Replays everything that ``events`` holds by now. ``progress``: see `read_to_end`. Raises `LogError`."""
    start = start or Start()
    summary = ReplaySummary()
    partitions = [Partition(topics.events, number) for number in range(topics.partitions)]
    consumer = log.consumer()
    begins = await consumer.beginning_offsets(partitions)
    await consumer.close()
    first = {p: max(begin, start.offsets.get(p.number, 0)) for p, begin in begins.items()}
    async with aclosing(read_to_end(log, partitions, first, progress=progress)) as records:
        async for record in records:
            if start.covers(record) and (replayed := replay.apply(record)) is not None:
                output.write(replayed)
                summary.add(replayed)
    await output.close()
    summary.incomplete = len(replay.incomplete)
    summary.open = replay.open
    summary.unreadable = replay.unreadable
    return summary


async def open_output(topic: str, log: Log, settings: Settings) -> TopicOutput:
    """Creates the topic. Raises `ConfigError` if it is one of the deployment's own, or holds records."""
    topics = settings.topics
    if topic in {own.name for own in topics.all}:
        raise ConfigError(f"--to {topic}: that is one of the deployment's own topics; name a new one")
    await log.create_topics([Topic(topic, topics.partitions, "delete", "rollout_id")])
    consumer = log.consumer()
    ends = await consumer.end_offsets([Partition(topic, n) for n in range(topics.partitions)])
    await consumer.close()
    if any(ends.values()):
        raise ConfigError(f"--to {topic}: the topic holds records already; name a new one")
    return TopicOutput(log, topic, settings.max_record_bytes)
