"""The search for rollouts behind the list in the browser. Texts are looked for in a part of them at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

from millstream.pipeline.store.queries import MOST_OPEN, SINCE, Ask, conditions, narrowed
from millstream.pipeline.store.results import RolloutOrder, checked_order

CUT: Final = 240  # characters of an input or an error in a list
WINDOW: Final = 20_000  # tasks whose rollouts' texts are looked through for a page; each may hold a long conversation

_ROLLOUTS: Final = """
SELECT
    rollout_id, group_id, group_size, experiment_id, mode, status, attempts, lost_attempts, turns, reward,
    model_version, trainable, ifNull(reason, '') AS reason, error_type,
    substringUTF8(error_message, 1, {cut}) AS error_message, substringUTF8(input, 1, {cut}) AS input,
    toUnixTimestamp64Nano(created_at) AS created, queued_s, duration_s, prompt_tokens, response_tokens
FROM rollouts
WHERE {where}
ORDER BY {order}
LIMIT {limit} OFFSET {offset}
"""
# The part of the rollouts that is looked through: by id, which begins with the time, so that it is a range of each
# table's key, and reading stops at its end. A rollout has a row for each attempt.
_LOOKED: Final = """
SELECT uniqExact(rollout_id) AS rollouts, count() AS tasks, min(rollout_id) AS oldest,
    toUnixTimestamp64Nano(min(created_at)) AS since
FROM (
    SELECT rollout_id, created_at FROM tasks_raw
    WHERE {where} AND ({before:String} = '' OR rollout_id < {before:String})
    ORDER BY rollout_id DESC LIMIT {window:UInt32}
)
"""
_PART: Final = "rollout_id >= {oldest:String} AND ({before:String} = '' OR rollout_id < {before:String})"
# Rollouts of that part that may have the text; those whose input or model answers have it for sure. Of other texts only
# those count that `rollouts` shows.
_HOLDING: Final = f"""
SELECT rollout_id, max(sure) AS sure
FROM (
    SELECT rollout_id, true AS sure FROM tasks_raw
    WHERE {_PART} AND positionCaseInsensitiveUTF8(input, {{text:String}}) > 0
    UNION ALL
    SELECT rollout_id, true FROM triplets_raw
    WHERE {_PART} AND positionCaseInsensitiveUTF8(response, {{text:String}}) > 0
    UNION ALL
    SELECT rollout_id, false FROM attempts_raw
    WHERE {_PART} AND (positionCaseInsensitiveUTF8(ifNull(output, ''), {{text:String}}) > 0
        OR positionCaseInsensitiveUTF8(error_message, {{text:String}}) > 0)
    UNION ALL
    SELECT rollout_id, false FROM rollout_ends_raw
    WHERE {_PART} AND positionCaseInsensitiveUTF8(ifNull(reason, ''), {{text:String}}) > 0
)
GROUP BY rollout_id
ORDER BY rollout_id DESC
LIMIT {{most:UInt32}}
"""  # noqa: S608 - of constants
_SHOWN: Final = """(
    rollout_id IN {sure:Array(String)}
    OR positionCaseInsensitiveUTF8(ifNull(output, ''), {text:String}) > 0
    OR positionCaseInsensitiveUTF8(error_message, {text:String}) > 0
    OR positionCaseInsensitiveUTF8(ifNull(reason, ''), {text:String}) > 0
)"""
# An id is looked for among all of them.
_NAMED: Final = """
SELECT DISTINCT rollout_id FROM tasks_raw
WHERE rollout_id = {text:String} OR group_id = {text:String} OR endsWith(rollout_id, {text:String})
LIMIT {most:UInt32}
"""


@dataclass(frozen=True, slots=True)
class RolloutSearch:
    """What a page of rollouts asks for; empty: any. ``since_s``: published in the last seconds; 0: ever. ``before``: an
    id; texts are looked for in rollouts with smaller ones."""

    status: str = ""
    experiment_id: str = ""
    group_id: str = ""
    mode: str = ""
    model_version: str = ""
    resources_id: str = ""
    text: str = ""
    before: str = ""
    since_s: int = 0
    sort_by: str = "created_at"
    descending: bool = True

    @property
    def filters(self) -> dict[str, str]:
        names = ("status", "experiment_id", "group_id", "mode", "model_version", "resources_id")
        return {name: value for name in names if (value := getattr(self, name))}


@dataclass(frozen=True, slots=True)
class Looked:
    """The part of the rollouts whose texts were looked through: the newest, or the newest before
    `RolloutSearch.before`."""

    rollouts: int
    since: int  # ns, when the oldest was published
    before: str  # where the next part begins; empty if this was the last


@dataclass(frozen=True, slots=True)
class Found:
    """``looked``: None unless a text was searched for."""

    rows: list[dict[str, Any]]
    looked: Looked | None = None


def find_rollouts(ask: Ask, search: RolloutSearch, limit: int, offset: int = 0, *, window: int = WINDOW) -> Found:
    """Rows of the view `rollouts`, texts cut to `CUT` characters. ``window``: tasks that are looked through for a
    text. Raises ValueError for an order that isn't one of `RolloutOrder`."""
    direction = "DESC" if search.descending else "ASC"
    order = f"{checked_order(search.sort_by)} {direction} NULLS LAST, rollout_id {direction}"
    wanted: Mapping[str, Any] = search.filters
    looked, texts = None, ""
    bound: dict[str, Any] = {}
    if search.text:
        looked, ids, texts, bound = _holding(ask, search, window)
        wanted = {**wanted, "rollout_id": ids}
    else:
        by, since_s = search.sort_by, search.since_s
        wanted, offset = narrowed(
            ask, wanted, sort_by=by, direction=direction, limit=limit, offset=offset, since_s=since_s
        )
    where, parameters = conditions(wanted)
    if search.since_s:
        parameters["since"] = search.since_s
        where += f" AND {SINCE.format(created='created_at')}"
    sql = (
        _ROLLOUTS.replace("{cut}", str(CUT))
        .replace("{where}", where + texts)
        .replace("{order}", order)
        .replace("{limit}", str(int(limit)))
        .replace("{offset}", str(int(offset)))
    )
    return Found(ask(sql, parameters | bound).records(), looked)


def _holding(ask: Ask, search: RolloutSearch, window: int) -> tuple[Looked, list[str], str, dict[str, Any]]:
    """The part that is looked through; ids of rollouts in it that may hold the text; the condition that they do, with
    its parameters. At most `MOST_OPEN` ids: a part with more ends there."""
    of_tasks = {name: value for name, value in search.filters.items() if name in ("group_id", "experiment_id", "mode")}
    where, parameters = conditions(of_tasks)
    place = {"text": search.text, "before": search.before, "most": MOST_OPEN}
    sql = _LOOKED.replace("{where}", where)
    (part,) = ask(sql, parameters | {"before": search.before, "window": window}).records()
    rollouts, oldest, since = part["rollouts"], part["oldest"], part["since"]
    found = ask(_HOLDING, place | {"oldest": oldest}).records() if rollouts else []
    last = part["tasks"] < window
    if len(found) == MOST_OPEN:
        oldest, last = found[-1]["rollout_id"], False
        sql = _LOOKED.replace("{where}", f"{where} AND rollout_id >= {{oldest:String}}")
        bound = {"before": search.before, "window": window, "oldest": oldest}
        (part,) = ask(sql, parameters | bound).records()
        rollouts, since = part["rollouts"], part["since"]
    sure = [row["rollout_id"] for row in found if row["sure"]]
    if not search.before:
        named = ask(_NAMED, {"text": search.text, "most": MOST_OPEN}).records()
        sure += [row["rollout_id"] for row in named]
    ids = sorted({*sure, *(row["rollout_id"] for row in found)})
    looked = Looked(rollouts, since, "" if last else oldest)
    return looked, ids, f" AND {_SHOWN}", {"sure": sure, "text": search.text}


def orders() -> tuple[str, ...]:
    return get_args(RolloutOrder)
