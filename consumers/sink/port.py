"""The port of sinks: what keeps the records of the log. ClickHouse is an implementation, and ``millstream sink --sink
mypackage.module:MySink`` takes one of your own; ``examples/sink`` has some to copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from millstream.schemas.errors import CodecError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.records import Record


@dataclass(frozen=True, slots=True)
class Unusable:
    """A record that can't be stored. ``reason`` is short: undecodable, unstorable."""

    record: LogRecord
    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of several topics, each partition's in its order and without a gap.

    ``token`` is 64 hexadecimal digits; the same token means the same records.
    """

    records: Sequence[LogRecord]
    token: str

    def decoded(self) -> tuple[list[tuple[LogRecord, Record]], list[Unusable]]:
        """Each record with its decoded value, and those that can't be decoded: return these from `Sink.write`."""
        pairs, unusable = [], []
        for record in self.records:
            try:
                pairs.append((record, codec.decode(record.value)))
            except CodecError as error:
                unusable.append(Unusable(record, "undecodable", str(error)))
        return pairs, unusable


@runtime_checkable
class Sink(Protocol):
    """Keeps records. ``--sink`` names a sink, or a callable that takes the `Settings` and returns one. Used from one
    thread at a time, not always the same one.

    Delivery is at least once. The offsets of a batch are committed after ``write`` and ``flush`` have both returned, so
    until then it may come again: as the same batch with the same token if one of them raised `StoreError`; after a
    crash or a rebalance its records come in other batches, perhaps in another process. A record's place (topic,
    partition, offset) is the same each time: a sink has to store a record under its place, or under an identity of the
    record's own, so that readers see it once.
    """

    def write(self, batch: Batch) -> list[Unusable]:
        """Takes a batch; need not be durable before ``flush``. Returns the records that can never be stored, each with
        the reason: they become dead letters, and the others are stored all the same.

        Raises `StoreError` if a retry may help: the role then backs off and repeats the batch for as long as it takes.
        Any other exception ends the process.
        """

    def flush(self) -> None:
        """Makes durable what has been written. Raises as ``write`` does."""

    def close(self) -> None:
        """Releases what the sink holds. The next process gets what has been written and not flushed again."""
