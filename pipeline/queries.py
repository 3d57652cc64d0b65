"""The questions that Millstream itself asks the store."""

from typing import Final

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
