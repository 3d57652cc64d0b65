"""The parts of every log: partitions, records, headers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from millstream.schemas.wire.records import Record

KIND_HEADER = "kind"  # the kind of record, so that a reader may skip its body
ROLLOUT_HEADER = "rollout"  # of a task: the rollout's id, so that it can be ended if its body can't be read
Headers = Mapping[str, bytes]


class Partition(NamedTuple):
    """A partition of a topic."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.number}]"


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A record and its position in the log. ``value`` is encoded, or the object itself if it never left the process."""

    partition: Partition
    offset: int
    timestamp: int  # ms since the epoch
    key: str | None
    value: bytes | Record
    headers: Headers = field(default_factory=dict)

    @property
    def place(self) -> str:
        """For messages: ``topic[partition]@offset``."""
        return f"{self.partition}@{self.offset}"


def age_s(timestamp: int | None) -> float:
    """Age of a record with this timestamp (ms since the epoch); 0 for None, and for one of a faster clock."""
    return 0.0 if timestamp is None else max(time.time() - timestamp / 1000, 0.0)


@dataclass(frozen=True, slots=True)
class EndOfPartition:
    """A consumer has reached the end of a partition; ``offset`` is that of the next record."""

    partition: Partition
    offset: int
