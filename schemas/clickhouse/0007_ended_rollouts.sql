-- How many tokens a rollout took is known at its end, and kept with it: `rollouts` no longer adds up triplets.
ALTER TABLE rollout_ends_raw
    ADD COLUMN IF NOT EXISTS prompt_tokens Int64 AFTER spans,
    ADD COLUMN IF NOT EXISTS response_tokens Int64 AFTER prompt_tokens;

-- Of the ends that a store already holds: once more, with their tokens. The row that comes last replaces its twin.
INSERT INTO rollout_ends_raw
WITH
    reported AS (  -- by the model's server, for calls without token ids
        SELECT
            RolloutId AS rollout_id,
            AttemptId AS attempt_id,
            SpanId AS span_id,
            max(PromptTokens) AS prompt_tokens,
            max(ResponseTokens) AS response_tokens
        FROM spans_raw
        WHERE Kind = 'llm' AND RolloutId IN (SELECT rollout_id FROM triplets_raw WHERE empty(response_token_ids))
        GROUP BY rollout_id, attempt_id, span_id
    ),
    tokens AS (
        SELECT
            t.rollout_id AS rollout_id,
            sum(if(empty(t.response_token_ids), r.prompt_tokens, t.prefix_tokens + length(t.prompt_token_ids))) AS prompts,
            sum(if(empty(t.response_token_ids), r.response_tokens, length(t.response_token_ids))) AS responses
        FROM (SELECT * FROM triplets_raw FINAL) AS t
        LEFT JOIN reported AS r
            ON t.rollout_id = r.rollout_id AND t.attempt_id = r.attempt_id AND t.span_id = r.span_id
        GROUP BY rollout_id
    )
SELECT e.* REPLACE (tokens.prompts AS prompt_tokens, tokens.responses AS response_tokens)
FROM (SELECT * FROM rollout_ends_raw FINAL WHERE prompt_tokens = 0 AND response_tokens = 0) AS e
INNER JOIN tokens ON e.rollout_id = tokens.rollout_id
WHERE tokens.prompts + tokens.responses > 0
SETTINGS do_not_merge_across_partitions_select_final = 1, throw_on_max_partitions_per_insert_block = 0;

-- Rollouts that have ended, without their texts: of one table alone, so that a million are filtered, sorted and added up
-- in a fraction of the time that `rollouts` takes.
CREATE OR REPLACE VIEW ended_rollouts AS
SELECT
    rollout_id, group_id, group_size, experiment_id, mode, resources_id, status, attempts, lost_attempts, turns, spans,
    reward, model_version, trainable, reason, created_at, ended_at, prompt_tokens, response_tokens
FROM rollout_ends_raw FINAL
SETTINGS do_not_merge_across_partitions_select_final = 1;

-- One row per rollout. Its end decides; until there is one, so do its attempts. Tokens are those of the deciding
-- attempt's LLM calls: their ids, or what the server reports.
CREATE OR REPLACE VIEW rollouts AS
WITH
    latest AS (
        SELECT
            rollout_id,
            argMax(group_id, attempt) AS group_id,
            argMax(group_size, attempt) AS group_size,
            argMax(experiment_id, attempt) AS experiment_id,
            argMax(mode, attempt) AS mode,
            argMax(priority, attempt) AS priority,
            argMax(input, attempt) AS input,
            argMax(resources_id, attempt) AS resources_id,
            argMax(metadata, attempt) AS metadata,
            argMax(lost_attempts, attempt) AS lost_attempts,
            min(created_at) AS created_at
        FROM tasks_raw FINAL
        GROUP BY rollout_id
    ),
    tried AS (
        SELECT
            rollout_id,
            count() AS attempts,
            max(attempt) AS last_attempt,
            maxIf(attempt, retry_offset IS NOT NULL) AS last_retried,
            min(started_at) AS started_at,
            anyIf(output, status = 'succeeded') AS output,
            argMaxIf((error_type, error_message), live_offset, error_type != '') AS failure
        FROM attempts
        GROUP BY rollout_id
    ),
    ends AS (SELECT *, toNullable(ended_at) AS end_time FROM rollout_ends_raw FINAL)
SELECT
    latest.rollout_id AS rollout_id,
    latest.group_id AS group_id,
    latest.group_size AS group_size,
    latest.experiment_id AS experiment_id,
    latest.mode AS mode,
    priority,
    input,
    latest.resources_id AS resources_id,
    multiIf(
        end_time IS NOT NULL, ends.status,
        tried.attempts = 0, 'queued',
        tried.last_retried >= tried.last_attempt, 'retrying',
        'running'
    ) AS status,
    if(end_time IS NOT NULL, ends.attempts, toInt32(tried.attempts)) AS attempts,
    if(end_time IS NOT NULL, ends.lost_attempts, latest.lost_attempts) AS lost_attempts,
    ends.turns AS turns,
    ends.spans AS spans,
    ends.reward AS reward,
    ends.model_version AS model_version,
    if(end_time IS NULL, NULL, ends.trainable) AS trainable,
    ends.reason AS reason,
    tried.output AS output,
    if(end_time IS NOT NULL AND ends.status = 'succeeded', '', tried.failure.1) AS error_type,
    if(end_time IS NOT NULL AND ends.status = 'succeeded', '', tried.failure.2) AS error_message,
    latest.created_at AS created_at,
    if(tried.attempts = 0, NULL, toNullable(tried.started_at)) AS started_at,
    end_time AS ended_at,
    dateDiff('nanosecond', created_at, started_at) / 1e9 AS queued_s,
    dateDiff('nanosecond', started_at, ended_at) / 1e9 AS duration_s,
    ends.prompt_tokens AS prompt_tokens,
    ends.response_tokens AS response_tokens,
    latest.metadata AS metadata
FROM latest
LEFT JOIN tried ON latest.rollout_id = tried.rollout_id
LEFT JOIN ends ON latest.rollout_id = ends.rollout_id
SETTINGS do_not_merge_across_partitions_select_final = 1, join_use_nulls = 0;
