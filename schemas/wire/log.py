"""What a log is made of, whichever log it is: partitions, records, headers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from millstream.schemas.wire.records import Record

KIND_HEADER = "kind"  # what a record is, so that a reader may skip its body
Headers = Mapping[str, bytes]


class Partition(NamedTuple):
    """A partition of a topic."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.number}]"


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A record with its place in the log. ``value`` is encoded, or live if it never left the process."""

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


@dataclass(frozen=True, slots=True)
class EndOfPartition:
    """A consumer has read everything that a partition held; ``offset`` is the next one to come."""

    partition: Partition
    offset: int
