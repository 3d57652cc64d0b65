"""The questions that Millstream itself asks the store."""

import json
from collections.abc import Iterator
from typing import Any, Final

from millstream.pipeline.store import Result, Store

# What a training run shows at its end, by title; a user can paste each into `millstream sql`.
CLOSING_QUERIES: Final = {
    "Reward by policy version": """
SELECT model_version, count() AS rollouts, round(avg(reward), 3) AS mean_reward, sum(turns) AS turns
FROM rollouts
WHERE mode = 'train' AND status = 'succeeded'
GROUP BY model_version
ORDER BY min(created_at)
""",
    "Slowest rollouts": """
SELECT rollout_id, mode, status, round(queued_s, 3) AS queued_s, round(duration_s, 3) AS duration_s, turns, reward
FROM rollouts
ORDER BY duration_s DESC NULLS LAST
LIMIT 5
""",
    "Tool calls by name and success": """
SELECT name, succeeded, count() AS calls, round(quantile(0.5)(duration_s) * 1000, 2) AS median_ms
FROM tool_calls
GROUP BY name, succeeded
ORDER BY calls DESC
LIMIT 8
""",
}

_ROLLOUTS = """
SELECT rollout_id, experiment_id, mode, status, attempts, round(reward, 3) AS reward, model_version,
    round(duration_s, 3) AS duration_s, created_at, if(error_message = '', reason, error_message) AS error
FROM rollouts
WHERE ({status:String} = '' OR status = {status:String})
    AND ({experiment:String} = '' OR experiment_id = {experiment:String})
ORDER BY rollout_id DESC
LIMIT {limit:UInt64}
"""


def list_rollouts(store: Store, *, status: str | None = None, experiment: str | None = None, limit: int = 50) -> Result:
    """Rollouts, newest first (their ids sort by time). Raises `StoreError`."""
    return store.query(_ROLLOUTS, {"status": status or "", "experiment": experiment or "", "limit": limit})


def granules_read(store: Store, sql: str) -> Result:
    """What a query reads of each table, once per reading: parts and granules, and the indexes that chose them.

    Raises `StoreError`, also for what can't be explained.
    """
    plan = "".join(row[0] for row in store.query(f"EXPLAIN json = 1, indexes = 1 {sql}").rows)
    rows = []
    for node in _nodes(json.loads(plan)[0]["Plan"]):
        if node["Node Type"] == "ReadFromMergeTree":
            # Each index leaves less to the next. That of the last step is what is read, of the first what there is.
            steps = node["Indexes"]
            first, last = steps[0], steps[-1]
            used = [s.get("Name", s["Type"]) for s in steps if s["Selected Granules"] < s["Initial Granules"]]
            rows.append(
                (
                    node["Description"],
                    last["Selected Parts"],
                    first["Initial Parts"],
                    last["Selected Granules"],
                    first["Initial Granules"],
                    ", ".join(used),
                )
            )
    return Result(("table", "parts_read", "parts", "granules_read", "granules", "indexes"), rows)


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)
