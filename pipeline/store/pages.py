"""The queries behind the pages in the browser that `queries` does not have: bounded, with texts cut by the engine."""

from collections.abc import Mapping
from typing import Any, Final

from millstream.pipeline.store.queries import Ask

# How rollouts ended in the last seconds. Rates come from what ended, not from what was published.
RECENT_ENDS: Final = """
SELECT
    count() AS ended,
    countIf(status = 'succeeded') AS succeeded,
    countIf(status = 'failed') AS failed,
    avgIf(reward, mode = 'train') AS reward,
    quantileExactIf(0.5)(dateDiff('nanosecond', started_at, ended_at) / 1e9, started_at IS NOT NULL) AS duration_p50,
    quantileExactIf(0.99)(dateDiff('nanosecond', started_at, ended_at) / 1e9, started_at IS NOT NULL) AS duration_p99,
    quantileExactIf(0.9)(dateDiff('nanosecond', created_at, started_at) / 1e9, started_at IS NOT NULL) AS queued_p90,
    sum(lost_attempts) AS lost,
    sum(greatest(attempts - 1, 0)) AS retries
FROM rollout_ends_raw FINAL
WHERE ended_at >= now64(9) - toIntervalSecond({seconds:UInt32})
SETTINGS do_not_merge_across_partitions_select_final = 1
"""

# Tokens of model calls in the last seconds. A call that proxy and agent have both recorded counts once: of the source
# with more of them.
RECENT_TOKENS: Final = """
SELECT max(calls) AS calls, max(prompt) AS prompt, max(response) AS response
FROM (
    SELECT count() AS calls, sum(PromptTokens) AS prompt, sum(ResponseTokens) AS response
    FROM spans_raw FINAL
    WHERE Kind = 'llm' AND Timestamp >= now64(9) - toIntervalSecond({seconds:UInt32})
    GROUP BY Source
    SETTINGS do_not_merge_across_partitions_select_final = 1
)
"""

ENDS_BY_STATUS: Final = """
SELECT status, count() AS rollouts
FROM ended_rollouts
GROUP BY status
ORDER BY rollouts DESC
"""

WORKERS: Final = """
SELECT worker_id, role, host, version, slots, running,
    dateDiff('millisecond', started_at, now64(9)) / 1e3 AS up_s
FROM workers
WHERE last_seen >= now64(9) - toIntervalSecond({seconds:UInt32})
ORDER BY role, started_at
LIMIT 200
"""

# What can be seen of a rollout, in little: it changes when a page of it would.
ROLLOUT_STATE: Final = """
SELECT
    status,
    ended_at IS NOT NULL AS ended,
    (SELECT arraySort(groupArray(a.status)) FROM attempts AS a WHERE a.rollout_id = {rollout_id:String}) AS tries,
    (SELECT count() FROM spans AS s WHERE s.RolloutId = {rollout_id:String}) AS held
FROM rollouts
WHERE rollout_id = {rollout_id:String}
"""

# Of the training run that last made a step: its newest steps together.
LATEST_STEPS: Final = """
SELECT experiment_id, any(run) AS run, max(step) AS last_step, count() AS steps, argMax(reward_mean, step) AS reward,
    sum(wait_s) AS wait_s, sum(update_s) AS update_s, sum(save_s) AS save_s, sum(publish_s) AS publish_s,
    sum(other_s) AS other_s, max(toUnixTimestamp64Nano(ended_at)) AS ended
FROM (
    SELECT * FROM training_steps
    WHERE experiment_id IN (SELECT experiment_id FROM training_steps ORDER BY ended_at DESC LIMIT 1)
    ORDER BY epoch DESC, step DESC LIMIT 20
)
GROUP BY experiment_id
"""

# The task of an attempt, for the adapter's rules.
TASK: Final = """
SELECT rollout_id, attempt, group_id, group_size, input, mode, priority, resources_id, max_attempts, lost_attempts,
    max_lost_attempts, timeout_s, lease_s, unresponsive_s, retry_on, seed, experiment_id, metadata,
    toUnixTimestamp64Nano(created_at) AS created_at
FROM tasks
WHERE rollout_id = {rollout_id:String}
ORDER BY abs(attempt - {attempt:Int32})
LIMIT 1
"""

# A group's members, the highest reward first, and the rewards of their turns.
MEMBERS: Final = """
SELECT rollout_id, status, reward, turns, model_version, trainable, ifNull(reason, '') AS reason,
    substringUTF8(error_message, 1, 240) AS error_message, duration_s, experiment_id, group_size,
    substringUTF8(input, 1, 4000) AS input
FROM rollouts
WHERE rollout_id IN {ids:Array(String)}
ORDER BY reward DESC NULLS LAST, rollout_id
"""
TURN_REWARDS: Final = """
SELECT rollout_id, turn, reward
FROM triplets
WHERE rollout_id IN {ids:Array(String)}
ORDER BY rollout_id, turn
"""
DECIDING: Final = """
SELECT rollout_id, if(countIf(status = 'succeeded') > 0, anyIf(attempt_id, status = 'succeeded'),
    argMax(attempt_id, (attempt, started_at))) AS attempt_id
FROM attempts
WHERE rollout_id IN {ids:Array(String)}
GROUP BY rollout_id
"""

RECENT_DEAD: Final = "SELECT count() FROM dead_letters WHERE time >= now64(9) - toIntervalSecond({seconds:UInt32})"

# The pause record of each experiment that is paused now.
PAUSED: Final = """
SELECT name AS experiment_id, toUnixTimestamp64Nano(created_at) AS since
FROM controls_raw FINAL
WHERE kind = 'pause' AND body = 'true'
ORDER BY name
"""

DEAD_LETTERS: Final = """
SELECT partition, offset, role, reason, key, source_topic, source_partition, source_offset,
    substringUTF8(error, 1, 240) AS error, toUnixTimestamp64Nano(time) AS at
FROM dead_letters
WHERE ({reason:String} = '' OR reason = {reason:String}) AND ({role:String} = '' OR role = {role:String})
ORDER BY time DESC, partition, offset
LIMIT {limit:UInt32} OFFSET {offset:UInt32}
"""

DEAD_REASONS: Final = (
    "SELECT reason, count() AS letters FROM dead_letters GROUP BY reason ORDER BY letters DESC LIMIT 50"
)


def record(ask: Ask, sql: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The only row of a query that has one."""
    return ask(sql, parameters or {}).records()[0]
