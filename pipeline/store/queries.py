"""The queries behind the store's methods and the commands."""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final, TypeVar

from millstream.pipeline.store.results import Result
from millstream.schemas.control import Resources
from millstream.schemas.wire.records import Control, Record, Span, SpanEvent, SpanLink, Triplet
from millstream.schemas.wire.versions import to_text

Ask = Callable[[str, Mapping[str, Any]], Result]
R = TypeVar("R", bound=Record)

# Reward by model version.
REWARDS_BY_VERSION: Final = """
SELECT
    model_version,
    count() AS rollouts,
    avg(reward) AS mean,
    quantileExact(0.1)(reward) AS p10,
    quantileExact(0.5)(reward) AS p50,
    quantileExact(0.9)(reward) AS p90
FROM ended_rollouts
WHERE reward IS NOT NULL
    AND ({experiment_id:String} = '' OR experiment_id = {experiment_id:String})
    AND ({mode:String} = '' OR mode = {mode:String})
GROUP BY model_version
ORDER BY min(ended_at), model_version
"""

# Those of training runs, and those that tasks were published with. The newest first.
EXPERIMENTS: Final = """
SELECT experiment_id, max(run) AS run
FROM (
    SELECT experiment_id, run, created_at FROM experiments
    UNION ALL
    SELECT experiment_id, '' AS run, created_at FROM tasks WHERE experiment_id != ''
)
GROUP BY experiment_id
ORDER BY max(created_at) DESC
"""

# Training runs with what became of them, the newest first. Abandoned steps don't count.
TRAINING_RUNS: Final = """
SELECT
    e.experiment_id AS experiment_id,
    run,
    algorithm,
    seed,
    version,
    toUnixTimestamp64Nano(created_at) AS created_at,
    s.steps AS steps,
    s.epochs AS epochs,
    s.seconds AS seconds,
    s.reward AS reward,
    s.validation_reward AS validation_reward
FROM experiments AS e
LEFT JOIN (
    SELECT
        experiment_id,
        maxIf(step, NOT abandoned) AS steps,
        max(epoch) + 1 AS epochs,
        sum(training_steps.seconds) AS seconds,
        argMaxIf(reward_mean, step, NOT abandoned) AS reward,
        argMaxIf(training_steps.validation_reward, step, NOT abandoned AND isNotNull(training_steps.validation_reward))
            AS validation_reward
    FROM training_steps
    GROUP BY experiment_id
) AS s ON e.experiment_id = s.experiment_id
ORDER BY created_at DESC, experiment_id
"""

# The last steps of a training run, the newest first.
STEPS: Final = """
SELECT * REPLACE (toUnixTimestamp64Nano(started_at) AS started_at, toUnixTimestamp64Nano(ended_at) AS ended_at)
FROM training_steps
WHERE experiment_id = {experiment_id:String}
ORDER BY epoch DESC, step DESC
LIMIT {limit:UInt64}
"""

# The training run that last made a step.
LATEST_TRAINING: Final = "SELECT experiment_id FROM training_steps ORDER BY ended_at DESC LIMIT 1"

# The versions of a model side by side: rewards of the rollouts that succeeded (none given counts as 0), with the 95 %
# confidence interval of the normal approximation. A rollout that met two versions counts as `mixed`.
COMPARE_VERSIONS: Final = """
WITH arms AS (
    SELECT
        RolloutId AS rollout_id,
        if(uniqExact(ModelVersion) > 1, 'mixed', any(assumeNotNull(ModelVersion))) AS version
    FROM spans
    WHERE Source = 'proxy' AND SpanAttributes['gen_ai.request.model'] = {model:String} AND ModelVersion IS NOT NULL
    GROUP BY RolloutId
)
SELECT
    version AS model_version,
    count() AS rollouts,
    countIf(status = 'failed') AS failures,
    round(avgIf(ifNull(reward, 0), status = 'succeeded'), 4) AS mean_reward,
    round(1.96 * stddevSampIf(ifNull(reward, 0), status = 'succeeded') / sqrt(rollouts - failures), 4) AS plus_minus,
    round(mean_reward - plus_minus, 4) AS ci95_low,
    round(mean_reward + plus_minus, 4) AS ci95_high
FROM arms
INNER JOIN ended_rollouts AS r ON arms.rollout_id = r.rollout_id
WHERE status IN ('succeeded', 'failed')
GROUP BY version
ORDER BY min(r.created_at), version
"""

SINCE: Final = "{created} >= now64(9) - toIntervalSecond({{since:UInt32}})"
_TIMES = ("created_at", "started_at", "ended_at", "last_seen", "time")
_OF_TASKS: Final = {"rollout_id", "group_id", "experiment_id", "mode"}  # filters that the task alone answers
_OF_ENDS: Final = _OF_TASKS | {"status", "model_version"}  # those that the end answers
OPEN: Final = ("queued", "running", "retrying")  # statuses of rollouts that have not ended
_OPEN_IDS: Final = """
SELECT DISTINCT rollout_id FROM tasks_raw WHERE rollout_id NOT IN (SELECT rollout_id FROM rollout_ends_raw)
"""
MOST_OPEN: Final = 5000  # rollouts that are named in a query
_KNOWN_AT_END: Final = {"ended_at", "reward", "model_version"}  # orders without a value before
_ORDERS_OF_ENDS: Final = _KNOWN_AT_END | {"created_at", "attempts", "turns"}
# Times of rollouts as in `rollouts`, without joins: each table fills in its columns. A row that is there twice has the
# same values.
_BY_TIMES: Final = """
SELECT rollout_id
FROM (
    SELECT
        rollout_id, max(group_id) AS group_id, max(experiment_id) AS experiment_id, max(mode) AS mode,
        max(status) AS status, max(model_version) AS model_version,
        min(published) AS created_at, min(claimed) AS started_at,
        dateDiff('nanosecond', created_at, started_at) AS queued_s,
        dateDiff('nanosecond', started_at, max(ended)) AS duration_s
    FROM (
        SELECT rollout_id, group_id, experiment_id, mode, '' AS status, NULL AS model_version,
            toNullable(tasks_raw.created_at) AS published, NULL AS claimed, NULL AS ended
        FROM tasks_raw
        UNION ALL
        SELECT rollout_id, '', '', '', '', NULL, NULL, toNullable(time), NULL
        FROM attempts_raw WHERE attempts_raw.status = 'preparing'
        UNION ALL
        SELECT rollout_id, '', '', '', status, model_version, NULL, NULL, toNullable(ended_at)
        FROM rollout_ends_raw
    )
    GROUP BY rollout_id
    HAVING created_at IS NOT NULL
)
WHERE {where}
ORDER BY {order}
"""
_ORDERS_BY_TIMES: Final = {"started_at", "queued_s", "duration_s"}


def read(
    ask: Ask,
    record: type[R],
    view: str,
    filters: Mapping[str, Any],
    *,
    order: str,
    limit: int | None = None,
    offset: int = 0,
) -> list[R]:
    """Rows of a table or view whose columns have the names of the record's fields; times as ns since the epoch.

    ``filters``: column → value, any of a list, or None for no condition. Everything but their values is pasted into the
    text and must not come from a user."""
    names = [f.name for f in fields(record)]
    columns = [f"toUnixTimestamp64Nano({name}) AS {name}" if name in _TIMES else name for name in names]
    where, parameters = conditions(filters)
    sql = f"SELECT {', '.join(columns)} FROM {view} WHERE {where} ORDER BY {order}"  # noqa: S608
    return [record(**row) for row in ask(sql + _limit(limit, offset), parameters).records()]


def read_newest(
    ask: Ask, filters: Mapping[str, Any], direction: str, limit: int, offset: int = 0, since_s: int = 0
) -> list[str]:
    """Ids of the rollouts that were published last (``direction`` DESC) or first; ``filters`` as in `read`, of
    `_OF_TASKS` alone. ``since_s``: published in the last seconds; 0: ever."""
    where, parameters = conditions(filters)
    parameters["since"] = since_s
    order = f"min(created_at) {direction}, rollout_id {direction}"
    having = SINCE.format(created="min(created_at)") if since_s else "1"
    sql = f"SELECT rollout_id FROM tasks_raw WHERE {where} GROUP BY rollout_id HAVING {having} ORDER BY {order}"  # noqa: S608
    return [row["rollout_id"] for row in ask(sql + _limit(limit, offset), parameters).records()]


def narrowed(
    ask: Ask,
    filters: Mapping[str, Any],
    *,
    sort_by: str,
    direction: str,
    limit: int,
    offset: int = 0,
    since_s: int = 0,
) -> tuple[Mapping[str, Any], int]:
    """Filters that find the same page of `rollouts` for less, and how many rows to skip then: if one table tells which
    rollouts are on it, or which can be, the view is computed for these alone. Without such a table, what was given.

    ``filters``: as in `read`. ``sort_by``: a `RolloutOrder`. ``direction``: ASC or DESC. ``since_s``: published in the
    last seconds, which has to be a condition on the view, too; 0: ever."""

    def ids(sql: str, count: str) -> list[str]:
        return [row["rollout_id"] for row in ask(sql + count, parameters).records()]

    asked = {name for name, value in filters.items() if value is not None}
    where, parameters = conditions(filters)
    if sort_by == "created_at" and asked <= _OF_TASKS:
        return {"rollout_id": read_newest(ask, filters, direction, limit, offset, since_s)}, 0
    if filters.get("status") in OPEN and "rollout_id" not in asked:
        found = ids(_OPEN_IDS, _limit(MOST_OPEN + 1))
        return (filters, offset) if len(found) > MOST_OPEN else ({**filters, "rollout_id": found}, offset)
    if since_s:
        where, parameters = f"{where} AND {SINCE.format(created='created_at')}", {**parameters, "since": since_s}
    order = f"{sort_by} {direction} NULLS LAST, rollout_id {direction}"
    if asked <= _OF_ENDS and sort_by in _ORDERS_BY_TIMES:
        return {"rollout_id": ids(_BY_TIMES.format(where=where, order=order), _limit(limit, offset))}, 0
    if not asked <= _OF_ENDS or sort_by not in _ORDERS_OF_ENDS:
        return filters, offset
    only_ended = asked & {"status", "model_version"}
    if not only_ended and sort_by in _KNOWN_AT_END:
        where += f" AND {sort_by} IS NOT NULL"
    ended = f"SELECT rollout_id FROM ended_rollouts WHERE {where} ORDER BY {order}"  # noqa: S608
    if not only_ended and sort_by not in _KNOWN_AT_END:  # those that are open stand between them
        unended = ids(_OPEN_IDS, _limit(MOST_OPEN + 1))
        if max(len(unended), limit + offset) > MOST_OPEN or "rollout_id" in asked:
            return filters, offset
        return {**filters, "rollout_id": unended + ids(ended, _limit(limit + offset))}, offset
    found = ids(ended, _limit(limit, offset))
    if only_ended or len(found) == limit:
        return {"rollout_id": found}, 0
    return filters, offset  # those without a value follow


def read_spans(ask: Ask, filters: Mapping[str, Any]) -> list[Span]:
    """Spans in log order."""
    where, parameters = conditions(filters)
    return [_span(row) for row in ask(_SPANS.format(where=where), parameters).records()]


def read_triplets(ask: Ask, filters: Mapping[str, Any], limit: int | None) -> list[Triplet]:
    """Triplets with whole prompts."""
    plain = {"response_versions": "arrayMap(part -> (part.first_token, part.version), response_versions)"}
    names = ", ".join(plain.get(f.name, f.name) + f" AS {f.name}" for f in fields(Triplet))
    where, parameters = conditions(filters)
    sql = f"SELECT {names} FROM triplets WHERE {where} ORDER BY rollout_id, attempt_id, turn"  # noqa: S608
    found = [Triplet(**_record_fields(row)) for row in ask(sql + _limit(limit), parameters).records()]
    going_on = {t.rollout_id for t in found if t.prefix_turn is not None}
    if not going_on:
        return found
    where, parameters = conditions({"rollout_id": sorted(going_on)})
    rows = ask(f"SELECT * FROM triplet_prompts WHERE {where}", parameters).records()  # noqa: S608
    whole = {(row["rollout_id"], row["turn"]): row for row in rows}
    return [
        triplet if triplet.prefix_turn is None else _whole(triplet, whole[triplet.rollout_id, triplet.turn])
        for triplet in found
    ]


def _whole(triplet: Triplet, row: Mapping[str, Any]) -> Triplet:
    tokens = struct.pack(f"<{len(row['prompt_token_ids'])}i", *row["prompt_token_ids"]) or None
    return replace(
        triplet,
        prompt=row["prompt"],
        prompt_token_ids=tokens,
        tools=row["tools"],
        prefix_turn=None,
        prefix_tokens=0,
        prefix_characters=0,
    )


def read_latest_resources(ask: Ask, experiment_id: str | None) -> Resources | None:
    filters = {"kind": "resources", "experiment_id": experiment_id}
    found = read(ask, Control, "controls_raw FINAL", filters, order="name DESC", limit=1)
    return Resources.from_control(found[0]) if found else None


def conditions(filters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """SQL with a bound parameter for each filter that is given."""
    given = {name: value for name, value in filters.items() if value is not None}
    parts = [
        f"{name} IN {{f_{name}:Array(String)}}"
        if isinstance(value, Sequence) and not isinstance(value, str)
        else f"{name} = {{f_{name}:{'Bool' if isinstance(value, bool) else 'String'}}}"
        for name, value in given.items()
    ]
    return " AND ".join(parts) or "1", {
        f"f_{name}": value if isinstance(value, str | bool) else list(value) for name, value in given.items()
    }


def _limit(limit: int | None, offset: int = 0) -> str:
    """Both are numbers, so they may stand in the text."""
    return (f" LIMIT {int(limit)}" if limit is not None else "") + (f" OFFSET {int(offset)}" if offset else "")


_SPANS = """
SELECT
    s.TraceId AS trace_id, s.SpanId AS span_id, s.ParentSpanId AS parent_id, s.TraceState AS trace_state,
    s.SpanName AS name, s.Kind AS kind, s.SpanKind AS span_kind,
    toUnixTimestamp64Nano(s.Timestamp) AS start, start + toInt64(s.Duration) AS end,
    s.StatusCode AS status, s.StatusMessage AS status_message, s.SpanAttributes AS attributes,
    arrayMap(t -> toUnixTimestamp64Nano(t), s.`Events.Timestamp`) AS event_times,
    arrayZip(s.`Events.Name`, event_times, s.`Events.Attributes`) AS events,
    arrayZip(s.`Links.TraceId`, s.`Links.SpanId`, s.`Links.Attributes`) AS links,
    s.ResourceAttributes AS resource, s.ScopeName AS scope_name, s.ScopeVersion AS scope_version,
    s.RolloutId AS rollout_id, s.AttemptId AS attempt_id, s.Source AS source, s.Sequence AS sequence,
    t.prompt_token_ids AS prompt_token_ids, t.has_prompt AS has_prompt,
    t.response_token_ids AS response_token_ids, t.has_response AS has_response,
    t.response_logprobs AS response_logprobs, t.has_logprobs AS has_logprobs,
    s.Reward AS reward, s.RewardName AS reward_name, s.ModelVersion AS model_version
FROM (
    SELECT *, RolloutId AS rollout_id, AttemptId AS attempt_id, SpanId AS span_id, Source AS source
    FROM spans WHERE {where}
) AS s
LEFT JOIN (SELECT * FROM token_ids WHERE {where}) AS t
    ON s.AttemptId = t.attempt_id AND s.Source = t.source AND s.Sequence = t.sequence AND s.SpanId = t.span_id
ORDER BY s.Offset
"""


def _span(row: dict[str, Any]) -> Span:
    kept = {"prompt_token_ids": "has_prompt", "response_token_ids": "has_response", "response_logprobs": "has_logprobs"}
    has = {name: row.pop(flag) for name, flag in kept.items()}
    row.pop("event_times")
    events = tuple(SpanEvent(name=name, time=time, attributes=kv) for name, time, kv in row.pop("events"))
    links = tuple(SpanLink(trace_id=trace, span_id=span, attributes=kv) for trace, span, kv in row.pop("links"))
    tokens = {name: value if has[name] else None for name, value in _packed(row).items()}
    return Span(**{**row, **tokens, "events": events, "links": links})


def _record_fields(row: dict[str, Any]) -> dict[str, Any]:
    versions = to_text(row["response_versions"]) if row["response_versions"] else None
    return {**row, **{name: value or None for name, value in _packed(row).items()}, "response_versions": versions}


def _packed(row: dict[str, Any]) -> dict[str, bytes]:
    """The record's little-endian int32 and float32, from arrays."""
    formats = {"prompt_token_ids": "i", "response_token_ids": "i", "response_logprobs": "f"}
    return {name: struct.pack(f"<{len(row[name])}{code}", *row[name]) for name, code in formats.items()}
