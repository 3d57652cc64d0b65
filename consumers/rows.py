"""Records → columns of the store's tables: pure, and by column, which is what makes inserting cheap.

What each column means stands in ``schemas/clickhouse/``.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from millstream.schemas import codec, semconv, status
from millstream.schemas.errors import CodecError
from millstream.schemas.ids import id_time_ms
from millstream.schemas.log import LogRecord
from millstream.schemas.records import (
    AttemptEvent,
    Control,
    DeadLetter,
    Record,
    RolloutEnd,
    RolloutTask,
    Span,
    Triplet,
    Worker,
)

DAY_MS = 86_400_000
MAX_DAY = 65_535  # of ClickHouse's Date: in the year 2149
MAX_COUNT = (1 << 32) - 1

Fields = Mapping[str, Sequence[Any]]  # field name → its value in each record
Column = Callable[[Fields], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Rows:
    """What belongs into one table."""

    table: str
    column_names: tuple[str, ...]
    columns: list[Sequence[Any]]

    def __len__(self) -> int:
        return len(self.columns[0])

    def place(self, at: int) -> tuple[Any, ...]:
        """Topic, partition and offset of the record that a row comes from."""
        return tuple(column[at] for column in self.columns[-len(PLACE) :])

    def cut(self, start: int, stop: int) -> "Rows":
        return Rows(self.table, self.column_names, [column[start:stop] for column in self.columns])


@dataclass(frozen=True, slots=True)
class Unusable:
    """A record that has no row. ``reason`` is short: undecodable, unstorable."""

    record: LogRecord
    reason: str
    error: str


def to_rows(records: Iterable[LogRecord], marks_topic: str) -> tuple[list[Rows], list[Unusable]]:
    """The rows of a batch, table by table, and what could not be decoded.

    Of what the adapter writes twice one copy counts: of a `RolloutEnd` its mark on ``marks_topic``, where its offset
    compares with those of the attempts; of a `DeadLetter` the one elsewhere, which is whole.
    """
    found: dict[type[Record], list[tuple[Any, ...]]] = {t: [] for t in codec.CODECS}
    unusable = []
    for record in records:
        value = record.value
        place = (record.partition.topic, record.partition.number, record.offset)
        try:
            kind = codec.type_of(value)
            row = _values(kind, value)
            if kind in MARKS and MARKS[kind] != (place[0] == marks_topic):
                continue
            if kind is AttemptEvent:
                if (task := _claimed(row)) is not None:
                    found[RolloutTask].append((*task, 1, *place))
            elif kind in _TOKEN_VALUES and (uneven := _uneven(_TOKEN_VALUES[kind](row))) is not None:
                unusable.append(Unusable(record, "unstorable", f"{kind.__name__}.{uneven}"))
                continue
            elif kind is RolloutTask:
                row = (*row, 0)
            found[kind].append((*row, *place))
        except CodecError as error:
            unusable.append(Unusable(record, "undecodable", str(error)))
    tables = [table.rows(found[table.kind]) for table in TABLES if found[table.kind]]
    return [rows for rows in tables if len(rows)], unusable


MARKS: dict[type[Record], bool] = {RolloutEnd: True, DeadLetter: False}  # whether the copy among the events counts
PLACE = ("topic", "partition", "offset")
LOG_PLACE = tuple(f"log_{name}" for name in PLACE)  # a dead letter has fields of the same names
_EXTRA: dict[type[Record], tuple[str, ...]] = {RolloutTask: ("claimed",)}
_NAMES = {t: (*c.field_names, *_EXTRA.get(t, ()), *LOG_PLACE) for t, c in codec.CODECS.items()}
_FROM_DICT = {t: operator.itemgetter(*c.field_names) for t, c in codec.CODECS.items()}
_FROM_RECORD = {t: operator.attrgetter(*c.field_names) for t, c in codec.CODECS.items()}
_TASK = codec.CODECS[AttemptEvent].field_names.index("task")


def _values(kind: type[Record], value: bytes | Record) -> tuple[Any, ...]:
    """The field values; what is nested is a dict if the record was encoded, else an object."""
    if isinstance(value, bytes):
        return _FROM_DICT[kind](codec.codec_of(value).decode_dict(value))  # type: ignore[no-any-return]
    return _FROM_RECORD[kind](value)


def _claimed(row: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The task that a claim carries. None if that is no task: the adapter puts such a claim away."""
    try:
        task = row[_TASK]
        return None if task is None or codec.type_of(task) is not RolloutTask else _values(RolloutTask, task)
    except CodecError:
        return None


def _uneven(tokens: tuple[bytes | None, ...]) -> str | None:
    """What is wrong with token ids or logprobs that are no numbers of four bytes."""
    for name, value in zip(_TOKEN_FIELDS, tokens, strict=True):
        if value is not None and len(value) % 4:
            return f"{name}: {len(value)} bytes are no numbers of four bytes each"
    return None


@dataclass(frozen=True, slots=True)
class Table:
    """Where the records of a type go, or those that pass ``only``, and what each column holds."""

    name: str
    kind: type[Record]
    columns: dict[str, Column]
    only: Callable[[tuple[Any, ...]], bool] | None = None

    def rows(self, records: list[tuple[Any, ...]]) -> Rows:
        names = _NAMES[self.kind]
        if self.only is not None:
            records = list(filter(self.only, records))
        values = zip(*records, strict=True) if records else ((),) * len(names)
        fields = dict(zip(names, values, strict=True))
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
    """Days since the epoch within the id; 0 for one without a date, so that such rows too lie with their twins."""
    try:
        day = id_time_ms(rollout_id) // DAY_MS
    except ValueError:
        return 0
    return day if day <= MAX_DAY else 0


def _get(nested: Any, name: str) -> Any:
    return nested[name] if isinstance(nested, dict) else getattr(nested, name)


def _inner(name: str, inner: str) -> Column:
    """One field of an array of records, as an array."""
    return lambda fields: [[_get(item, inner) for item in items] if items else () for items in fields[name]]


def _of_error(inner: str) -> Column:
    return lambda fields: ["" if error is None else _get(error, inner) for error in fields["error"]]


def _tokens(name: str, usage: str) -> Column:
    """Tokens of a call, counted; else as the provider says."""

    def count(ids: bytes | None, attributes: Mapping[str, str]) -> int:
        if ids is not None:
            return len(ids) // 4
        text = attributes.get(usage, "0")
        return min(int(text), MAX_COUNT) if text.isdecimal() and len(text) <= 10 else 0

    return lambda fields: list(map(count, fields[name], fields["attributes"]))


def _duration(fields: Fields) -> list[int]:
    return [max(0, end - start) for start, end in zip(fields["start"], fields["end"], strict=True)]


def _version(fields: Fields) -> list[int]:
    """The larger one stays: the last of the heartbeats, the first of anything else."""
    return [
        offset if state == status.RUNNING else -offset
        for state, offset in zip(fields["status"], fields["log_offset"], strict=True)
    ]


def _first(fields: Fields) -> list[int]:
    return [-offset for offset in fields["log_offset"]]


_TOKEN_FIELDS = ("prompt_token_ids", "response_token_ids", "response_logprobs")
_TOKEN_VALUES: dict[type[Record], Callable[[tuple[Any, ...]], tuple[bytes | None, ...]]] = {
    kind: operator.itemgetter(*map(codec.CODECS[kind].field_names.index, _TOKEN_FIELDS)) for kind in (Span, Triplet)
}


def _has_tokens(row: tuple[Any, ...]) -> bool:
    return any(value is not None for value in _TOKEN_VALUES[Span](row))


_DATE = {"date": _each("rollout_id", _day)}
# As they are; the table turns them into arrays.
_TOKENS = {
    name: _field(f) for name, f in zip(("prompt_bytes", "response_bytes", "logprobs_bytes"), _TOKEN_FIELDS, strict=True)
}
_PLACE = {name: _field(source) for name, source in zip(PLACE, LOG_PLACE, strict=True)}

TABLES: tuple[Table, ...] = (
    Table(
        "tasks_raw",
        RolloutTask,
        _DATE
        | _copied("rollout_id", "attempt", "group_id", "group_size", "input", "mode", "priority", "resources_id")
        | _copied("max_attempts", "losses", "max_losses", "timeout_s", "lease_s", "unresponsive_s", "retry_on", "seed")
        | _copied("experiment_id", "metadata", "created_at", "claimed")
        | _PLACE,
    ),
    Table(
        "attempts_raw",
        AttemptEvent,
        _DATE
        | _copied("rollout_id", "attempt_id", "status", "attempt", "worker_id", "time", "lease_s")
        | {f"error_{name}": _of_error(name) for name in ("type", "message", "stack")}
        | _copied("span_counts", "output", "metadata")
        | {"state": _each("state", lambda state: state or b""), "version": _version}
        | _PLACE,
    ),
    Table(
        "rollout_ends_raw",
        RolloutEnd,
        _DATE | _copied(*codec.CODECS[RolloutEnd].field_names) | {"version": _first} | _PLACE,
    ),
    Table(
        "spans_raw",
        Span,
        {
            "Date": _each("rollout_id", _day),
            "Timestamp": _field("start"),
            "TraceId": _field("trace_id"),
            "SpanId": _field("span_id"),
            "ParentSpanId": _field("parent_id"),
            "TraceState": _field("trace_state"),
            "SpanName": _field("name"),
            "SpanKind": _field("span_kind"),
            "ServiceName": _each("resource", lambda resource: resource.get("service.name", "")),
            "ResourceAttributes": _field("resource"),
            "ScopeName": _field("scope_name"),
            "ScopeVersion": _field("scope_version"),
            "SpanAttributes": _field("attributes"),
            "Duration": _duration,
            "StatusCode": _field("status"),
            "StatusMessage": _field("status_message"),
            "Events.Timestamp": _inner("events", "time"),
            "Events.Name": _inner("events", "name"),
            "Events.Attributes": _inner("events", "attributes"),
            "Links.TraceId": _inner("links", "trace_id"),
            "Links.SpanId": _inner("links", "span_id"),
            "Links.TraceState": _each("links", lambda links: [""] * len(links)),
            "Links.Attributes": _inner("links", "attributes"),
            "RolloutId": _field("rollout_id"),
            "AttemptId": _field("attempt_id"),
            "Source": _field("source"),
            "Kind": _field("kind"),
            "Sequence": _field("sequence"),
            "Reward": _field("reward"),
            "RewardName": _field("reward_name"),
            "ModelVersion": _field("model_version"),
            "PromptTokens": _tokens("prompt_token_ids", semconv.INPUT_TOKENS),
            "ResponseTokens": _tokens("response_token_ids", semconv.OUTPUT_TOKENS),
            "Topic": _field("log_topic"),
            "Partition": _field("log_partition"),
            "Offset": _field("log_offset"),
        },
    ),
    Table(
        "token_ids_raw",
        Span,
        _DATE
        | _copied("rollout_id", "attempt_id", "source", "sequence", "span_id", "model_version")
        | _TOKENS
        | _PLACE,
        only=_has_tokens,
    ),
    Table(
        "triplets_raw",
        Triplet,
        _DATE
        | _copied(*(name for name in codec.CODECS[Triplet].field_names if name not in _TOKEN_FIELDS))
        | _TOKENS
        | _PLACE,
    ),
    Table("controls_raw", Control, _copied(*codec.CODECS[Control].field_names) | _PLACE),
    Table(
        "workers_raw",
        Worker,
        _copied("worker_id", "role", "host", "version", "slots", "running", "last_seen")
        | {"started_at": _field("started")}
        | _PLACE,
    ),
    Table(
        "dead_letters_raw",
        DeadLetter,
        {f"source_{name}": _field(name) for name in PLACE}
        | _copied("role", "reason", "error", "time", "key", "value", "headers")
        | {"written_at": _field("timestamp")}
        | _PLACE,
    ),
)
