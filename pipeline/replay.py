"""Runs a replay: records of ``events`` from the log, and from the store what retention has taken, into an output."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime

from millstream.consumers.adapter.replay import Replay, Replayed
from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.pipeline.replay_output import Output
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.topics import Topics

Stored = Callable[[set[str]], Iterable[LogRecord]]  # the recorded events of all rollouts but those


@dataclass(frozen=True, slots=True)
class Start:
    """Where a replay begins: what was claimed before is left out."""

    offsets: Mapping[int, int] = field(default_factory=dict)  # by partition number; 0 for the others
    time_ms: int = 0  # since the epoch

    @classmethod
    def parse(cls, text: str) -> "Start":
        """``0:120,1:340`` (partition:offset) or a time, ``2027-01-15T08:00`` (UTC unless it says otherwise)."""
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
    """What a replay has written, and what it could not."""

    rollouts: int = 0
    from_store: int = 0
    triplets: int = 0
    trainable: int = 0  # triplets
    rewards: list[float] = field(default_factory=list)  # of rollouts that have one
    incomplete: int = 0  # rollouts that ended, but whose beginning is not there or was left out
    open: int = 0  # rollouts that have not ended
    unreadable: int = 0  # records

    def add(self, replayed: Replayed) -> None:
        self.rollouts += 1
        self.triplets += len(replayed.triplets)
        self.trainable += sum(triplet.trainable for triplet in replayed.triplets)
        if replayed.end.reward is not None:
            self.rewards.append(replayed.end.reward)


async def run_replay(
    log: Log, topics: Topics, replay: Replay, output: Output, stored: Stored, start: Start | None = None
) -> ReplaySummary:
    """Replays everything that lies on ``events`` by now. ``stored`` is asked only if the log no longer holds all that
    ``start`` asks for; those rollouts come last. Raises `LogError` and `StoreError`."""
    start = start or Start()
    summary = ReplaySummary()

    def take(record: LogRecord) -> None:
        if start.covers(record) and (replayed := replay.apply(record)) is not None:
            output.write(replayed)
            summary.add(replayed)

    partitions = [Partition(topics.events, number) for number in range(topics.partitions)]
    consumer = log.consumer()
    begins = await consumer.beginning_offsets(partitions)
    await consumer.close()
    first = {p: max(begin, start.offsets.get(p.number, 0)) for p, begin in begins.items()}
    async with aclosing(read_to_end(log, partitions, first)) as records:
        async for record in records:
            take(record)
    if any(begin > start.offsets.get(p.number, 0) for p, begin in begins.items()):
        before = summary.rollouts
        for record in stored(replay.replayed):
            take(record)
        summary.from_store = summary.rollouts - before
    output.close()
    summary.incomplete = len(replay.incomplete)
    summary.open = replay.open
    summary.unreadable = replay.unreadable
    return summary
