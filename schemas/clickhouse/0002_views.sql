-- What people query: exact at every moment, whatever has been sent again. A row and its twin lie in the same partition,
-- so FINAL need not look across partitions.

-- Every publication of a task; `attempt` counts them.
CREATE OR REPLACE VIEW tasks AS
SELECT * EXCEPT (date, claimed)
FROM tasks_raw FINAL
SETTINGS do_not_merge_across_partitions_select_final = 1;

CREATE OR REPLACE VIEW spans AS
SELECT * EXCEPT (Date)
FROM spans_raw FINAL
SETTINGS do_not_merge_across_partitions_select_final = 1;

-- The tokens of every span that has some.
CREATE OR REPLACE VIEW token_ids AS
SELECT * EXCEPT (date)
FROM token_ids_raw FINAL
SETTINGS do_not_merge_across_partitions_select_final = 1;

CREATE OR REPLACE VIEW triplets AS
SELECT
    * EXCEPT (date, topic, partition, offset),
    toUInt32(prefix_tokens + length(prompt_token_ids)) AS prompt_tokens,
    toUInt32(length(response_token_ids)) AS response_tokens,
    topic, partition, offset
FROM triplets_raw FINAL
SETTINGS do_not_merge_across_partitions_select_final = 1;

-- The whole prompts of those triplets that go on from an earlier turn: their rows hold only what is new (prefix_turn).
-- Ask for one rollout, or few: a conversation's whole prompts grow with the square of its length.
CREATE OR REPLACE VIEW triplet_prompts AS
SELECT rollout_id, whole.1 AS turn, whole.2 AS prompt, whole.3 AS prompt_token_ids, whole.5 AS tools
FROM (
    SELECT
        rollout_id,
        arrayFold(
            (done, next) -> arrayPushBack(done, (
                next.1,
                concat(substringUTF8(done[indexOf(done.1, ifNull(next.2, -1))].2, 1, next.4), next.5),
                arrayConcat(
                    arraySlice(
                        arrayConcat(
                            done[indexOf(done.1, ifNull(next.2, -1))].3,
                            done[indexOf(done.1, ifNull(next.2, -1))].4
                        ),
                        1, next.3
                    ),
                    next.6
                ),
                next.7,
                multiIf(
                    next.2 IS NULL, next.8,
                    next.8 = '[]', NULL,
                    ifNull(next.8, done[indexOf(done.1, ifNull(next.2, -1))].5)
                )
            )),
            arraySort(t -> t.1, groupArray((
                turn, prefix_turn, prefix_tokens, prefix_characters,
                prompt, prompt_token_ids, response_token_ids, tools
            ))),
            CAST([], 'Array(Tuple(Int32, String, Array(Int32), Array(Int32), Nullable(String)))')
        ) AS turns
    FROM triplets_raw FINAL
    GROUP BY rollout_id
    SETTINGS do_not_merge_across_partitions_select_final = 1
)
ARRAY JOIN turns AS whole;

-- One row per attempt. The first terminal event counts, unless the adapter's mark (retry, or the rollout's end) lies
-- before it: then the attempt is lost, and whatever it still wrote is late. The rules are those of `schemas.status`.
CREATE OR REPLACE VIEW attempts AS
WITH
    status IN ('succeeded', 'failed', 'timeout', 'unresponsive', 'cancelled', 'lost') AS terminal,
    events AS (
        SELECT
            rollout_id,
            attempt_id,
            any(attempt) AS attempt,
            anyIf(worker_id, status != 'retry') AS worker_id,
            minIf(time, status = 'preparing') AS started_at,
            maxIf(time, status != 'retry') AS last_seen,
            countIf(status = 'running') > 0 AS running,
            maxIf(offset, status IN ('preparing', 'running')) AS live_offset,
            minOrNullIf(offset, terminal) AS final_offset,
            argMinIf(status, offset, terminal) AS final_status,
            argMinIf(time, offset, terminal) AS final_time,
            argMinIf(error_type, offset, terminal) AS final_error_type,
            argMinIf(error_message, offset, terminal) AS final_error_message,
            argMinIf(error_stack, offset, terminal) AS final_error_stack,
            argMinIf(span_counts, offset, terminal) AS final_span_counts,
            argMinIf(output, offset, terminal) AS final_output,
            argMinIf(metadata, offset, terminal) AS final_metadata,
            minOrNullIf(offset, status = 'retry') AS retry_offset,
            minOrNullIf(time, status = 'retry') AS retry_time
        FROM attempts_raw FINAL
        GROUP BY rollout_id, attempt_id
        HAVING countIf(status = 'preparing') > 0
    ),
    ends AS (
        SELECT rollout_id, toNullable(offset) AS end_offset, toNullable(ended_at) AS end_time
        FROM rollout_ends_raw FINAL
    )
SELECT
    events.rollout_id AS rollout_id,
    events.attempt_id AS attempt_id,
    attempt,
    multiIf(ended, final_status, retry_offset IS NOT NULL OR end_offset IS NOT NULL, 'lost', running, 'running', 'preparing') AS status,
    worker_id,
    started_at,
    last_seen,
    if(ended, final_time, coalesce(retry_time, end_time)) AS ended_at,
    dateDiff('nanosecond', started_at, ended_at) / 1e9 AS duration_s,
    multiIf(ended AND final_error_type != '', final_error_type, status = 'lost', 'Lost', '') AS error_type,
    multiIf(
        ended AND final_error_type != '', final_error_message,
        status = 'lost', 'its process died, or sent no heartbeat within the lease', ''
    ) AS error_message,
    if(ended, final_error_stack, '') AS error_stack,
    if(ended, final_span_counts, map()) AS span_counts,
    if(ended AND final_status = 'succeeded', final_output, NULL) AS output,
    if(ended, final_metadata, map()) AS metadata,
    retry_offset,
    least(events.live_offset, coalesce(retry_offset, final_offset, events.live_offset)) AS live_offset,
    final_offset IS NOT NULL
        AND final_offset < coalesce(retry_offset, 9223372036854775807)
        AND final_offset < coalesce(end_offset, 9223372036854775807) AS ended
FROM events
LEFT JOIN ends ON events.rollout_id = ends.rollout_id
SETTINGS do_not_merge_across_partitions_select_final = 1, join_use_nulls = 0;

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
    ends AS (SELECT *, toNullable(ended_at) AS end_time FROM rollout_ends_raw FINAL),
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
            sum(if(empty(t.response_token_ids), r.prompt_tokens, t.prefix_tokens + length(t.prompt_token_ids))) AS prompt_tokens,
            sum(if(empty(t.response_token_ids), r.response_tokens, length(t.response_token_ids))) AS response_tokens
        FROM (SELECT * FROM triplets_raw FINAL) AS t
        LEFT JOIN reported AS r
            ON t.rollout_id = r.rollout_id AND t.attempt_id = r.attempt_id AND t.span_id = r.span_id
        GROUP BY rollout_id
    )
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
    tokens.prompt_tokens AS prompt_tokens,
    tokens.response_tokens AS response_tokens,
    latest.metadata AS metadata
FROM latest
LEFT JOIN tried ON latest.rollout_id = tried.rollout_id
LEFT JOIN ends ON latest.rollout_id = ends.rollout_id
LEFT JOIN tokens ON latest.rollout_id = tokens.rollout_id
SETTINGS do_not_merge_across_partitions_select_final = 1, join_use_nulls = 0;

CREATE OR REPLACE VIEW rewards AS
SELECT
    RolloutId AS rollout_id,
    AttemptId AS attempt_id,
    Timestamp AS time,
    ifNull(RewardName, '') AS name,
    assumeNotNull(Reward) AS value,
    Source AS source,
    Sequence AS sequence,
    SpanId AS span_id
FROM spans_raw FINAL
WHERE Reward IS NOT NULL
SETTINGS do_not_merge_across_partitions_select_final = 1;

CREATE OR REPLACE VIEW tool_calls AS
SELECT
    RolloutId AS rollout_id,
    AttemptId AS attempt_id,
    Timestamp AS time,
    if(mapContains(SpanAttributes, 'gen_ai.tool.name'), SpanAttributes['gen_ai.tool.name'], SpanName) AS name,
    SpanAttributes['gen_ai.tool.call.arguments'] AS arguments,
    SpanAttributes['gen_ai.tool.call.result'] AS result,
    StatusCode != 'Error' AND NOT mapContains(SpanAttributes, 'error.type') AS succeeded,
    if(StatusMessage = '', SpanAttributes['error.type'], StatusMessage) AS error_message,
    Duration / 1e9 AS duration_s,
    SpanId AS span_id
FROM spans_raw FINAL
WHERE Kind = 'tool'
SETTINGS do_not_merge_across_partitions_select_final = 1;

-- One row per version; `items` maps each name to its JSON, `model_version` is that of its first model.
CREATE OR REPLACE VIEW resources AS
SELECT
    name AS resources_id,
    experiment_id,
    created_at,
    mapFromArrays(JSONExtractKeys(body), arrayMap(kv -> kv.2, JSONExtractKeysAndValuesRaw(body))) AS items,
    arrayFirst(v -> v != '', arrayMap(kv -> JSONExtractString(kv.2, 'model_version'), JSONExtractKeysAndValuesRaw(body))) AS model_version
FROM controls_raw FINAL
WHERE kind = 'resources';

-- One row per training run, with its resolved configuration as JSON.
CREATE OR REPLACE VIEW experiments AS
SELECT
    name AS experiment_id,
    JSONExtractString(body, 'run') AS run,
    JSONExtractString(body, 'algorithm') AS algorithm,
    JSONExtract(body, 'seed', 'Nullable(Int64)') AS seed,
    JSONExtractString(body, 'millstream') AS version,
    body AS configuration,
    created_at
FROM controls_raw FINAL
WHERE kind = 'experiment';

-- The last that each process told of itself.
CREATE OR REPLACE VIEW workers AS
SELECT *
FROM workers_raw FINAL;

CREATE OR REPLACE VIEW dead_letters AS
SELECT *
FROM dead_letters_raw FINAL;

-- Roll-ups per minute: sums over the rows above, so as exact as they are. Ask for a span of time (`minute >= …`): the
-- index on the time then leaves the rest unread.

-- Rollouts by the minute in which they ended.
CREATE OR REPLACE VIEW rollouts_per_minute AS
SELECT
    toStartOfMinute(ended_at) AS minute,
    experiment_id,
    mode,
    status,
    count() AS rollouts,
    sum(attempts) AS attempts,
    sum(lost_attempts) AS lost_attempts,
    sum(turns) AS turns,
    quantileExact(0.5)(dateDiff('nanosecond', started_at, ended_at) / 1e9) AS duration_p50_s,
    quantileExact(0.99)(dateDiff('nanosecond', started_at, ended_at) / 1e9) AS duration_p99_s
FROM rollout_ends_raw FINAL
GROUP BY minute, experiment_id, mode, status
SETTINGS do_not_merge_across_partitions_select_final = 1;

-- Rewards of whole rollouts.
CREATE OR REPLACE VIEW rewards_per_minute AS
SELECT
    toStartOfMinute(ended_at) AS minute,
    experiment_id,
    mode,
    model_version,
    count() AS rollouts,
    avg(reward) AS reward_mean,
    quantileExact(0.1)(reward) AS reward_p10,
    quantileExact(0.5)(reward) AS reward_p50,
    quantileExact(0.9)(reward) AS reward_p90
FROM rollout_ends_raw FINAL
WHERE reward IS NOT NULL
GROUP BY minute, experiment_id, mode, model_version
SETTINGS do_not_merge_across_partitions_select_final = 1;

-- A call through the proxy that a traced agent makes is there twice, as the agent and as the proxy saw it: choose a source.
CREATE OR REPLACE VIEW tokens_per_minute AS
SELECT
    toStartOfMinute(Timestamp) AS minute,
    Source AS source,
    ModelVersion AS model_version,
    count() AS calls,
    sum(PromptTokens) AS prompt_tokens,
    sum(ResponseTokens) AS response_tokens
FROM spans_raw FINAL
WHERE Kind = 'llm'
GROUP BY minute, source, model_version
SETTINGS do_not_merge_across_partitions_select_final = 1;

CREATE OR REPLACE VIEW latency_per_minute AS
SELECT
    toStartOfMinute(Timestamp) AS minute,
    Source AS source,
    Kind AS kind,
    SpanName AS name,
    count() AS spans,
    countIf(StatusCode = 'Error') AS errors,
    quantileExact(0.5)(Duration) / 1e9 AS p50_s,
    quantileExact(0.9)(Duration) / 1e9 AS p90_s,
    quantileExact(0.99)(Duration) / 1e9 AS p99_s
FROM spans_raw FINAL
GROUP BY minute, source, kind, name
SETTINGS do_not_merge_across_partitions_select_final = 1;

-- Names and types of the OpenTelemetry Collector's ClickHouse exporter, for Grafana and whatever else reads its tables.
CREATE OR REPLACE VIEW otel_traces AS
SELECT
    Timestamp, TraceId, SpanId, ParentSpanId, TraceState, SpanName, SpanKind, ServiceName, ResourceAttributes,
    ScopeName, ScopeVersion, SpanAttributes, Duration, StatusCode, StatusMessage,
    `Events.Timestamp`, `Events.Name`, `Events.Attributes`,
    `Links.TraceId`, `Links.SpanId`, `Links.TraceState`, `Links.Attributes`
FROM spans_raw FINAL
SETTINGS do_not_merge_across_partitions_select_final = 1;

-- The smallest and largest are the same however often a row is there: no FINAL.
CREATE OR REPLACE VIEW otel_traces_trace_id_ts AS
SELECT
    TraceId,
    CAST(min(Timestamp), 'SimpleAggregateFunction(min, DateTime)') AS Start,
    CAST(max(Timestamp), 'SimpleAggregateFunction(max, DateTime)') AS End
FROM spans_raw
WHERE TraceId != ''
GROUP BY TraceId;
