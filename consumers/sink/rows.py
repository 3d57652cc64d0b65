"""Turns records into columns of the store's tables: pure, and by column, which makes inserts cheap. Spans, which are
most of the records, are not even decoded: see `encoded_spans`.

``schemas/clickhouse/`` says what each column means.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import Any, Protocol

from millstream.consumers.sink.encoded_spans import (
    TOKEN_FIELDS,
    Broken,
    EncodedInserter,
    EncodedSpans,
    span_body,
    uneven,
)
from millstream.consumers.sink.port import Unusable
from millstream.schemas.errors import CodecError, StoreError
from millstream.schemas.ids import id_time_ms
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.records import (
    AttemptEvent,
    Control,
    DeadLetter,
    Record,
    RolloutEnd,
    RolloutTask,
    Span,
    TrainingStep,
    Triplet,
    Worker,
)

DAY_MS = 86_400_000
MAX_DAY = 65_535  # of ClickHouse's Date: in the year 2149

Fields = Mapping[str, Sequence[Any]]  # field name → its value in each record
Column = Callable[[Fields], Sequence[Any]]


class RowsRefused(StoreError):
    """The table can't hold one of the rows: retrying the same block does not help."""


class Inserter(EncodedInserter, Protocol):
    """Takes the rows; `ClickHouseWriter` is one."""

    def insert(self, table: str, column_names: Sequence[str], columns: Sequence[Sequence[Any]], token: str) -> None:
        """Stores the rows. A block whose ``token`` was used before may be dropped. Raises `RowsRefused`, or
        `StoreError` if a retry may help: some of the rows may be stored by then."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one table."""

    table: str
    column_names: tuple[str, ...]
    columns: list[Sequence[Any]]

    def __len__(self) -> int:
        return len(self.columns[0])

    def place(self, at: int) -> tuple[Any, ...]:
        """Topic, partition and offset of the record that a row comes from."""
        return tuple(column[at] for column in self.columns[-len(PLACE) :])

    def insert(self, store: Inserter, token: str) -> None:
        store.insert(self.table, self.column_names, self.columns, token)

    def sift(self) -> tuple["Rows", list[Broken]]:
        """As in `EncodedSpans`; these are decoded already."""
        tokens = {name: self.columns[at] for at, name in enumerate(self.column_names) if name in _TOKENS}
        errors = [uneven(dict(zip(tokens, row, strict=True))) for row in zip(*tokens.values(), strict=True)]
        broken = [(self.place(at), "unstorable", error) for at, error in enumerate(errors) if error is not None]
        if not broken:
            return self, []
        kept = [error is None for error in errors]
        return Rows(self.table, self.column_names, [list(compress(column, kept)) for column in self.columns]), broken

    def cut(self, start: int, stop: int) -> "Rows":
        return Rows(self.table, self.column_names, [column[start:stop] for column in self.columns])


def to_rows(records: Iterable[LogRecord], marks_topic: str) -> tuple[list[Rows | EncodedSpans], list[Unusable]]:
    """The rows of a batch, table by table, and the records that could not be decoded; spans that can't be decoded are
    found when they are inserted.

    The adapter writes each `RolloutEnd` twice. Its mark on ``marks_topic`` counts, where its offset compares with those
    of the attempts.
    """
    found: dict[type[Record], list[tuple[Any, ...]]] = {t: [] for t in TABLES}
    spans: list[tuple[LogRecord, bytes]] = []
    unusable = []
    for record in records:
        value = record.value
        place = (record.partition.topic, record.partition.number, record.offset)
        try:
            kind = codec.type_of(value)
            if kind is Span:
                spans.append((record, span_body(value)))
                continue
            if kind not in TABLES:
                raise CodecError(f"{record.place}: {kind.__name__} is stored in no table")
            row = _values(kind, value)
            if kind is RolloutEnd and place[0] != marks_topic:
                continue
            if kind is AttemptEvent:
                if (task := _claimed(row)) is not None:
                    found[RolloutTask].append((*task, 1, *place))
            elif kind is RolloutTask:
                row = (*row, 0)
            found[kind].append((*row, *place))
        except CodecError as error:
            # No other role sends a dead letter for a record in memory that can't be encoded.
            unusable.append(Unusable(record, "undecodable" if isinstance(value, bytes) else "unstorable", str(error)))
    tables: list[Rows | EncodedSpans] = [TABLES[kind].rows(kind, rows) for kind, rows in found.items() if rows]
    return [*tables, EncodedSpans(spans)] if spans else tables, unusable


PLACE = ("topic", "partition", "offset")
LOG_PLACE = tuple(f"log_{name}" for name in PLACE)  # a dead letter has fields of the same names
_EXTRA: dict[type[Record], tuple[str, ...]] = {RolloutTask: ("claimed",)}
_NAMES = {t: (*c.field_names, *_EXTRA.get(t, ()), *LOG_PLACE) for t, c in codec.CODECS.items()}
_FROM_DICT = {t: operator.itemgetter(*c.field_names) for t, c in codec.CODECS.items()}
_FROM_RECORD = {t: operator.attrgetter(*c.field_names) for t, c in codec.CODECS.items()}
_TASK = codec.CODECS[AttemptEvent].field_names.index("task")
_CLAIM_ROLLOUT = codec.CODECS[AttemptEvent].field_names.index("rollout_id")
_TASK_ROLLOUT = codec.CODECS[RolloutTask].field_names.index("rollout_id")


def _values(kind: type[Record], value: bytes | Record) -> tuple[Any, ...]:
    """The field values; nested records are dicts if the record was encoded, else objects."""
    if isinstance(value, bytes):
        return _FROM_DICT[kind](codec.codec_of(value).decode_dict(value))  # type: ignore[no-any-return]
    return _FROM_RECORD[kind](value)


def _claimed(row: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The task within a claim. None if it isn't a task, or is another rollout's: the adapter sends such a claim to the
    dead letters."""
    try:
        encoded = row[_TASK]
        if encoded is None or codec.type_of(encoded) is not RolloutTask:
            return None
        task = _values(RolloutTask, encoded)
    except CodecError:
        return None
    return task if task[_TASK_ROLLOUT] == row[_CLAIM_ROLLOUT] else None


@dataclass(frozen=True, slots=True)
class Table:
    """The table of a type of records, and what each column holds."""

    name: str
    columns: dict[str, Column]

    def rows(self, kind: type[Record], records: list[tuple[Any, ...]]) -> Rows:
        fields = dict(zip(_NAMES[kind], zip(*records, strict=True), strict=True))
        return Rows(self.name, tuple(self.columns), [column(fields) for column in self.columns.values()])


# --- columns


def _field(name: str) -> Column:
    return operator.itemgetter(name)


def _each(name: str, convert: Callable[[Any], Any]) -> Column:
    return lambda fields: [convert(value) for value in fields[name]]


def _copied(*names: str) -> dict[str, Column]:
    return {name: _field(name) for name in names}


@lru_cache(maxsize=1 << 16)  # a rollout's records come together
def _day(rollout_id: str) -> int:
    """Days since the epoch, from the id; 0 for one without a date, so that repeated rows share a partition as well."""
    try:
        day = id_time_ms(rollout_id) // DAY_MS
    except ValueError:
        return 0
    return day if day <= MAX_DAY else 0


def _of_error(inner: str) -> Column:
    def text(error: Any) -> Any:
        if error is None:
            return ""
        return error[inner] if isinstance(error, dict) else getattr(error, inner)

    return _each("error", text)


def _version(fields: Fields) -> list[int]:
    """The row with the larger version stays: the last of the heartbeats, the first of anything else."""
    return [
        offset if state == status.RUNNING else -offset
        for state, offset in zip(fields["status"], fields["log_offset"], strict=True)
    ]


def _first(fields: Fields) -> list[int]:
    return [-offset for offset in fields["log_offset"]]


_DATE = {"date": _each("rollout_id", _day)}
# As they are; the table turns them into arrays.
_TOKENS = {
    name: _field(f) for name, f in zip(("prompt_bytes", "response_bytes", "logprobs_bytes"), TOKEN_FIELDS, strict=True)
}
_PLACE = {name: _field(source) for name, source in zip(PLACE, LOG_PLACE, strict=True)}

TABLES: dict[type[Record], Table] = {
    RolloutTask: Table(
        "tasks_raw",
        _DATE
        | _copied("rollout_id", "attempt", "group_id", "group_size", "input", "mode", "priority", "resources_id")
        | _copied(
            "max_attempts",
            "lost_attempts",
            "max_lost_attempts",
            "timeout_s",
            "lease_s",
            "unresponsive_s",
            "retry_on",
            "seed",
        )
        | _copied("experiment_id", "metadata", "created_at", "claimed")
        | _PLACE,
    ),
    AttemptEvent: Table(
        "attempts_raw",
        _DATE
        | _copied("rollout_id", "attempt_id", "status", "attempt", "worker_id", "time", "lease_s")
        | {f"error_{name}": _of_error(name) for name in ("type", "message", "stack")}
        | _copied("span_counts", "output", "metadata")
        | {"state": _each("state", lambda state: state or b""), "version": _version}
        | _PLACE,
    ),
    RolloutEnd: Table(
        "rollout_ends_raw",
        _DATE | _copied(*codec.CODECS[RolloutEnd].field_names) | {"version": _first} | _PLACE,
    ),
    Triplet: Table(
        "triplets_raw",
        _DATE
        | _copied(*(name for name in codec.CODECS[Triplet].field_names if name not in TOKEN_FIELDS))
        | _TOKENS
        | _PLACE,
    ),
    Control: Table("controls_raw", _copied(*codec.CODECS[Control].field_names) | _PLACE),
    TrainingStep: Table(
        "training_steps_raw", _copied(*codec.CODECS[TrainingStep].field_names) | {"version": _first} | _PLACE
    ),
    Worker: Table(
        "workers_raw",
        _copied("worker_id", "role", "host", "version", "slots", "running", "last_seen")
        | {"started_at": _field("started")}
        | _PLACE,
    ),
    DeadLetter: Table(
        "dead_letters_raw",
        {f"source_{name}": _field(name) for name in PLACE}
        | _copied("role", "reason", "error", "time", "key", "value", "headers")
        | {"written_at": _field("timestamp")}
        | _PLACE,
    ),
}
