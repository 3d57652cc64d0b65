"""Recorded events out of the store, for a replay of what retention has taken from the log."""

from array import array
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from millstream.pipeline.store import ClickHouseStore
from millstream.schemas import codec, status
from millstream.schemas.log import LogRecord, Partition
from millstream.schemas.records import AttemptEvent, Record, RolloutEnd, RolloutTask, Span, SpanEvent, SpanLink

ROLLOUTS = 200  # read at once

# Names of the columns are those of the records' fields, but for the spans.
NS = "toUnixTimestamp64Nano({0}) AS {0}"
PLACE = "topic, partition, offset"
TASK = ", ".join(f for f in codec.CODECS[RolloutTask].field_names if f not in ("created_at", "state"))
END_TIMES = ("created_at", "started_at", "ended_at")
END = ", ".join(NS.format(f) if f in END_TIMES else f for f in codec.CODECS[RolloutEnd].field_names)
SPAN = """
    TraceId AS trace_id, SpanId AS span_id, ParentSpanId AS parent_id, TraceState AS trace_state, SpanName AS name,
    Kind AS kind, SpanKind AS span_kind, toUnixTimestamp64Nano(Timestamp) AS start, start + Duration AS end,
    StatusCode AS status, StatusMessage AS status_message, SpanAttributes AS attributes,
    arrayMap(t -> toUnixTimestamp64Nano(t), `Events.Timestamp`) AS event_times, `Events.Name` AS event_names,
    `Events.Attributes` AS event_attributes, `Links.TraceId` AS link_traces, `Links.SpanId` AS link_spans,
    `Links.Attributes` AS link_attributes, ResourceAttributes AS resource, ScopeName AS scope_name,
    ScopeVersion AS scope_version, RolloutId AS rollout_id, AttemptId AS attempt_id, Source AS source,
    Sequence AS sequence, Reward AS reward, RewardName AS reward_name, ModelVersion AS model_version,
    Topic AS topic, Partition AS partition, Offset AS offset"""
TOKENS = {  # field: the type code of its numbers, and the column that tells an empty array from none
    "prompt_token_ids": ("i", "has_prompt"),
    "response_token_ids": ("i", "has_response"),
    "response_logprobs": ("f", "has_logprobs"),
}

Row = dict[str, Any]


def stored_events(store: ClickHouseStore, experiment_id: str, without: Collection[str]) -> Iterator[LogRecord]:
    """For each rollout that has ended, in the order of the ends on each partition: the claim of the attempt that
    succeeded, its spans and its end in log order, then the adapter's mark. All that `replay.Replay` reads; what the
    store doesn't keep (a task's saved state) is missing. Raises `StoreError`."""
    ends = _rows(
        store,
        f"SELECT {END}, {PLACE} FROM rollout_ends_raw FINAL WHERE experiment_id = {{e:String}} "  # noqa: S608
        "ORDER BY partition, offset",
        e=experiment_id,
    )
    todo = [(_place(row), RolloutEnd(**row)) for row in ends if row["rollout_id"] not in without]
    for at in range(0, len(todo), ROLLOUTS):
        some = todo[at : at + ROLLOUTS]
        before = _before(store, [end for _, end in some if end.status == status.SUCCEEDED])
        for place, end in some:
            yield from sorted(before.get(end.rollout_id, ()), key=lambda record: record.offset)
            yield _record(place, end.ended_at, end.rollout_id, end)


def _before(store: ClickHouseStore, ends: Sequence[RolloutEnd]) -> dict[str, list[LogRecord]]:
    """Claim, spans and success of each rollout."""
    rollouts = [end.rollout_id for end in ends]
    attempts = [end.attempt_id for end in ends]
    attempt_of = {end.rollout_id: end.attempts for end in ends}
    found: dict[str, list[LogRecord]] = {rollout_id: [] for rollout_id in rollouts}
    tasks = {
        row["rollout_id"]: codec.encode(RolloutTask(**row | {"retry_on": tuple(row["retry_on"])}))
        for row in _rows(
            store,
            f"SELECT {TASK}, {NS.format('created_at')} FROM tasks_raw FINAL WHERE rollout_id IN {{r:Array(String)}}",  # noqa: S608
            r=rollouts,
        )
        if row["attempt"] == attempt_of[row["rollout_id"]]
    }
    for row in _rows(
        store,
        "SELECT rollout_id, attempt_id, attempt, status, worker_id, toUnixTimestamp64Nano(time) AS time, lease_s, "  # noqa: S608
        f"span_counts, {PLACE} FROM attempts_raw FINAL WHERE rollout_id IN {{r:Array(String)}} "
        "AND attempt_id IN {a:Array(String)} AND status IN {s:Array(String)}",
        r=rollouts,
        a=attempts,
        s=[status.PREPARING, status.SUCCEEDED],
    ):
        place, rollout_id = _place(row), row["rollout_id"]
        task = tasks.get(rollout_id) if row["status"] == status.PREPARING else None
        found[rollout_id].append(_record(place, row["time"], rollout_id, AttemptEvent(**row, task=task)))
    tokens = {
        (row["partition"], row["offset"]): row
        for row in _rows(
            store,
            f"SELECT {', '.join(TOKENS)}, {', '.join(has for _, has in TOKENS.values())}, partition, offset "  # noqa: S608
            "FROM token_ids_raw FINAL WHERE rollout_id IN {r:Array(String)} AND attempt_id IN {a:Array(String)}",
            r=rollouts,
            a=attempts,
        )
    }
    for row in _rows(
        store,
        f"SELECT {SPAN} FROM spans_raw FINAL WHERE RolloutId IN {{r:Array(String)}} "  # noqa: S608
        "AND AttemptId IN {a:Array(String)}",
        r=rollouts,
        a=attempts,
    ):
        place = _place(row)
        span = _span(row, tokens.get((place[0].number, place[1]), {}))
        found[span.rollout_id].append(_record(place, span.start, span.rollout_id, span))
    return found


def _span(row: Row, tokens: Row) -> Span:
    for name, (code, has) in TOKENS.items():
        row[name] = array(code, tokens[name]).tobytes() if tokens.get(has) else None
    events = zip(row.pop("event_times"), row.pop("event_names"), row.pop("event_attributes"), strict=True)
    links = zip(row.pop("link_traces"), row.pop("link_spans"), row.pop("link_attributes"), strict=True)
    return Span(
        **row,
        events=tuple(SpanEvent(name=name, time=time, attributes=attributes) for time, name, attributes in events),
        links=tuple(SpanLink(trace_id=t, span_id=s, attributes=attributes) for t, s, attributes in links),
    )


def _rows(store: ClickHouseStore, sql: str, **parameters: Any) -> Iterator[Row]:
    result = store.sql(sql, parameters)
    return (dict(zip(result.columns, row, strict=True)) for row in result.rows)


def _place(row: Row) -> tuple[Partition, int]:
    return Partition(row.pop("topic"), row.pop("partition")), row.pop("offset")


def _record(place: tuple[Partition, int], time_ns: int, key: str, value: Record) -> LogRecord:
    return LogRecord(*place, time_ns // 1_000_000, key, value)
