-- What the sink writes. A row's identity is the sorting key, so that what is sent again replaces its twin; both lie in
-- the same partition, because that is the date within the rollout's id (1970 for ids without one). Query the views
-- (0002): they hold each row once. No materialised view adds anything up: what a crash repeats comes in other blocks,
-- and would count twice.

CREATE TABLE IF NOT EXISTS tasks_raw (
    date Date,
    rollout_id String CODEC(ZSTD(1)),
    attempt Int32,
    group_id String CODEC(ZSTD(1)),
    group_size Int32,
    input String CODEC(ZSTD(1)),
    mode LowCardinality(String),
    priority LowCardinality(String),
    resources_id LowCardinality(Nullable(String)),
    max_attempts Int32,
    lost_attempts Int32,
    max_lost_attempts Int32,
    timeout_s Float64,
    lease_s Float64,
    unresponsive_s Nullable(Float64),
    retry_on Array(LowCardinality(String)),
    seed Nullable(Int64),
    experiment_id LowCardinality(String),
    metadata Map(LowCardinality(String), String) CODEC(ZSTD(1)),
    created_at DateTime64(9, 'UTC'),
    claimed UInt8, -- 1: as the runner that claimed it wrote it down, which may know more than the publisher did
    topic LowCardinality(String),
    partition Int32,
    offset Int64
) ENGINE = ReplacingMergeTree(claimed)
PARTITION BY date
ORDER BY (rollout_id, attempt)
SETTINGS non_replicated_deduplication_window = 1000, ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1;

-- One row for each status of an attempt: of the heartbeats (status running) the last is kept, of anything else the
-- first, because that is the one which counts. `version` says which it is.
CREATE TABLE IF NOT EXISTS attempts_raw (
    date Date,
    rollout_id String CODEC(ZSTD(1)),
    attempt_id String CODEC(ZSTD(1)),
    status LowCardinality(String),
    attempt Int32,
    worker_id LowCardinality(String),
    time DateTime64(9, 'UTC'),
    lease_s Float64,
    error_type LowCardinality(String),
    error_message String CODEC(ZSTD(1)),
    error_stack String CODEC(ZSTD(1)),
    span_counts Map(LowCardinality(String), Int64),
    output Nullable(String) CODEC(ZSTD(1)),
    state String CODEC(ZSTD(1)),
    metadata Map(LowCardinality(String), String) CODEC(ZSTD(1)),
    version Int64,
    topic LowCardinality(String),
    partition Int32,
    offset Int64
) ENGINE = ReplacingMergeTree(version)
PARTITION BY date
ORDER BY (rollout_id, attempt_id, status)
SETTINGS non_replicated_deduplication_window = 1000, ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1;

-- The adapter's marks on the events topic: their offsets compare with those of the attempts.
CREATE TABLE IF NOT EXISTS rollout_ends_raw (
    date Date,
    rollout_id String CODEC(ZSTD(1)),
    group_id String CODEC(ZSTD(1)),
    group_size Int32,
    experiment_id LowCardinality(String),
    mode LowCardinality(String),
    resources_id LowCardinality(Nullable(String)),
    status LowCardinality(String),
    attempt_id Nullable(String) CODEC(ZSTD(1)),
    attempts Int32,
    lost_attempts Int32,
    turns Int32,
    spans Int32,
    reward Nullable(Float64),
    model_version LowCardinality(Nullable(String)),
    trainable Bool,
    reason Nullable(String) CODEC(ZSTD(1)),
    created_at DateTime64(9, 'UTC'),
    started_at Nullable(DateTime64(9, 'UTC')),
    ended_at DateTime64(9, 'UTC'),
    version Int64,
    topic LowCardinality(String),
    partition Int32,
    offset Int64,
    INDEX idx_time ended_at TYPE minmax GRANULARITY 1
) ENGINE = ReplacingMergeTree(version)
PARTITION BY date
ORDER BY rollout_id
SETTINGS non_replicated_deduplication_window = 1000, ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1;

-- Up to and including Links the columns of the OpenTelemetry Collector's ClickHouse exporter (its table otel_traces).
CREATE TABLE IF NOT EXISTS spans_raw (
    Date Date,
    Timestamp DateTime64(9) CODEC(Delta, ZSTD(1)),
    TraceId String CODEC(ZSTD(1)),
    SpanId String CODEC(ZSTD(1)),
    ParentSpanId String CODEC(ZSTD(1)),
    TraceState String CODEC(ZSTD(1)),
    SpanName LowCardinality(String) CODEC(ZSTD(1)),
    SpanKind LowCardinality(String) CODEC(ZSTD(1)),
    ServiceName LowCardinality(String) CODEC(ZSTD(1)),
    ResourceAttributes Map(LowCardinality(String), String) CODEC(ZSTD(1)),
    ScopeName String CODEC(ZSTD(1)),
    ScopeVersion String CODEC(ZSTD(1)),
    SpanAttributes Map(LowCardinality(String), String) CODEC(ZSTD(1)),
    Duration UInt64 CODEC(ZSTD(1)), -- ns
    StatusCode LowCardinality(String) CODEC(ZSTD(1)),
    StatusMessage String CODEC(ZSTD(1)),
    Events Nested (
        Timestamp DateTime64(9),
        Name LowCardinality(String),
        Attributes Map(LowCardinality(String), String)
    ) CODEC(ZSTD(1)),
    Links Nested (
        TraceId String,
        SpanId String,
        TraceState String,
        Attributes Map(LowCardinality(String), String)
    ) CODEC(ZSTD(1)),
    RolloutId String CODEC(ZSTD(1)),
    AttemptId String CODEC(ZSTD(1)),
    Source LowCardinality(String),
    Kind LowCardinality(String),
    Sequence Int64,
    Reward Nullable(Float64),
    RewardName LowCardinality(Nullable(String)),
    ModelVersion LowCardinality(Nullable(String)),
    PromptTokens UInt32,
    ResponseTokens UInt32,
    Topic LowCardinality(String),
    Partition Int32,
    Offset Int64,
    INDEX idx_trace_id TraceId TYPE bloom_filter(0.001) GRANULARITY 1,
    INDEX idx_time Timestamp TYPE minmax GRANULARITY 1
) ENGINE = ReplacingMergeTree
PARTITION BY Date
ORDER BY (RolloutId, AttemptId, Source, Sequence, SpanId)
SETTINGS non_replicated_deduplication_window = 1000, ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1;

-- The tokens of each span that has some; `has_…` tells an empty array from none.
CREATE TABLE IF NOT EXISTS token_ids_raw (
    date Date,
    rollout_id String CODEC(ZSTD(1)),
    attempt_id String CODEC(ZSTD(1)),
    source LowCardinality(String),
    sequence Int64,
    span_id String CODEC(ZSTD(1)),
    model_version LowCardinality(Nullable(String)),
    prompt_token_ids Array(Int32) CODEC(T64, ZSTD(1)),
    response_token_ids Array(Int32) CODEC(T64, ZSTD(1)),
    response_logprobs Array(Float32) CODEC(ZSTD(1)),
    has_prompt Bool,
    has_response Bool,
    has_logprobs Bool,
    topic LowCardinality(String),
    partition Int32,
    offset Int64
) ENGINE = ReplacingMergeTree
PARTITION BY date
ORDER BY (rollout_id, attempt_id, source, sequence, span_id)
SETTINGS non_replicated_deduplication_window = 1000, ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1;

-- Where the sink puts encoded spans, so that Python need not decode them: a Span's fields behind its place in the log,
-- and then its offset again. Keeps nothing; the two views below write the tables.
CREATE TABLE IF NOT EXISTS span_records (
    log_topic String,
    log_partition Int32,
    log_offset Int64,
    trace_id String,
    span_id String,
    parent_id String,
    trace_state String,
    name String,
    kind String,
    span_kind String,
    start Int64,
    end Int64,
    status String,
    status_message String,
    attributes Map(String, String),
    events Array(Tuple(name String, time Int64, attributes Map(String, String))),
    links Array(Tuple(trace_id String, span_id String, attributes Map(String, String))),
    resource Map(String, String),
    scope_name String,
    scope_version String,
    rollout_id String,
    attempt_id String,
    source String,
    sequence Int64,
    prompt_token_ids Nullable(String), -- int32, little-endian
    response_token_ids Nullable(String), -- int32, little-endian
    response_logprobs Nullable(String), -- float32, little-endian
    reward Nullable(Float64),
    reward_name Nullable(String),
    model_version Nullable(String),
    log_end Int64,
    tokens_end UInt8 ALIAS (ifNull(length(prompt_token_ids), 0) % 4) + (ifNull(length(response_token_ids), 0) % 4)
        + (ifNull(length(response_logprobs), 0) % 4),
    CONSTRAINT no_bytes_left_over CHECK log_end = log_offset,
    CONSTRAINT texts_are_utf8 CHECK isValidUTF8(concatWithSeparator('\n',
        trace_id, span_id, parent_id, trace_state, name, kind, span_kind, status, status_message, scope_name,
        scope_version, rollout_id, attempt_id, source, ifNull(reward_name, ''), ifNull(model_version, ''),
        arrayStringConcat(mapKeys(attributes), '\n'), arrayStringConcat(mapValues(attributes), '\n'),
        arrayStringConcat(mapKeys(resource), '\n'), arrayStringConcat(mapValues(resource), '\n'),
        arrayStringConcat(arrayMap(event -> concat(event.1, '\n', toString(event.3)), events), '\n'),
        arrayStringConcat(arrayMap(link -> concat(link.1, '\n', link.2, '\n', toString(link.3)), links), '\n')
    ))
) ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS spans_writer TO spans_raw AS
SELECT
    toDate(UUIDv7ToDateTime(toUUIDOrZero(rollout_id), 'UTC')) AS Date,
    fromUnixTimestamp64Nano(start) AS Timestamp,
    trace_id AS TraceId,
    span_id AS SpanId,
    parent_id AS ParentSpanId,
    trace_state AS TraceState,
    name AS SpanName,
    span_kind AS SpanKind,
    resource['service.name'] AS ServiceName,
    resource AS ResourceAttributes,
    scope_name AS ScopeName,
    scope_version AS ScopeVersion,
    attributes AS SpanAttributes,
    toUInt64(greatest(end - start, 0)) AS Duration,
    status AS StatusCode,
    status_message AS StatusMessage,
    arrayMap(t -> fromUnixTimestamp64Nano(t), events.time) AS `Events.Timestamp`,
    events.name AS `Events.Name`,
    events.attributes AS `Events.Attributes`,
    links.trace_id AS `Links.TraceId`,
    links.span_id AS `Links.SpanId`,
    arrayMap(link -> '', links.span_id) AS `Links.TraceState`,
    links.attributes AS `Links.Attributes`,
    rollout_id AS RolloutId,
    attempt_id AS AttemptId,
    source AS Source,
    kind AS Kind,
    sequence AS Sequence,
    reward AS Reward,
    reward_name AS RewardName,
    model_version AS ModelVersion,
    -- Tokens of a call, counted; else as the provider says.
    coalesce(intDiv(length(prompt_token_ids), 4), least(toUInt64OrZero(attributes['gen_ai.usage.input_tokens']), 4294967295)) AS PromptTokens,
    coalesce(intDiv(length(response_token_ids), 4), least(toUInt64OrZero(attributes['gen_ai.usage.output_tokens']), 4294967295)) AS ResponseTokens,
    log_topic AS Topic,
    log_partition AS Partition,
    log_offset AS Offset
FROM span_records
WHERE throwIf(tokens_end != 0, 'token ids or logprobs end within a number') = 0;

CREATE MATERIALIZED VIEW IF NOT EXISTS token_ids_writer TO token_ids_raw AS
SELECT
    toDate(UUIDv7ToDateTime(toUUIDOrZero(s.rollout_id), 'UTC')) AS date,
    s.rollout_id AS rollout_id,
    s.attempt_id AS attempt_id,
    s.source AS source,
    s.sequence AS sequence,
    s.span_id AS span_id,
    s.model_version AS model_version,
    reinterpret(ifNull(s.prompt_token_ids, ''), 'Array(Int32)') AS prompt_token_ids,
    reinterpret(ifNull(s.response_token_ids, ''), 'Array(Int32)') AS response_token_ids,
    reinterpret(ifNull(s.response_logprobs, ''), 'Array(Float32)') AS response_logprobs,
    s.prompt_token_ids IS NOT NULL AS has_prompt,
    s.response_token_ids IS NOT NULL AS has_response,
    s.response_logprobs IS NOT NULL AS has_logprobs,
    s.log_topic AS topic,
    s.log_partition AS partition,
    s.log_offset AS offset
FROM span_records AS s
WHERE (s.prompt_token_ids IS NOT NULL OR s.response_token_ids IS NOT NULL OR s.response_logprobs IS NOT NULL)
    AND throwIf(s.tokens_end != 0, 'token ids or logprobs end within a number') = 0;

-- Tokens come as the record's little-endian bytes (int32, float32) and are stored as arrays. An adapter of one's own may
-- have made others than those of the span.
CREATE TABLE IF NOT EXISTS triplets_raw (
    date Date,
    rollout_id String CODEC(ZSTD(1)),
    attempt_id String CODEC(ZSTD(1)),
    turn Int32,
    group_id String CODEC(ZSTD(1)),
    experiment_id LowCardinality(String),
    mode LowCardinality(String),
    resources_id LowCardinality(Nullable(String)),
    span_id String CODEC(ZSTD(1)),
    prompt String CODEC(ZSTD(1)),
    response String CODEC(ZSTD(1)),
    prompt_bytes Nullable(String) EPHEMERAL,
    response_bytes Nullable(String) EPHEMERAL,
    logprobs_bytes Nullable(String) EPHEMERAL,
    prompt_token_ids Array(Int32) DEFAULT reinterpret(ifNull(prompt_bytes, ''), 'Array(Int32)') CODEC(T64, ZSTD(1)),
    response_token_ids Array(Int32) DEFAULT reinterpret(ifNull(response_bytes, ''), 'Array(Int32)') CODEC(T64, ZSTD(1)),
    response_logprobs Array(Float32) DEFAULT reinterpret(ifNull(logprobs_bytes, ''), 'Array(Float32)') CODEC(ZSTD(1)),
    reward Nullable(Float64),
    model_version LowCardinality(Nullable(String)),
    agent_name LowCardinality(Nullable(String)),
    trainable Bool,
    reason Nullable(String) CODEC(ZSTD(1)),
    metadata Map(LowCardinality(String), String) CODEC(ZSTD(1)),
    tools Nullable(String) CODEC(ZSTD(1)),
    prefix_turn Nullable(Int32),
    prefix_tokens Int32,
    prefix_characters Int32,
    topic LowCardinality(String),
    partition Int32,
    offset Int64
) ENGINE = ReplacingMergeTree
PARTITION BY date
ORDER BY (rollout_id, attempt_id, turn)
SETTINGS non_replicated_deduplication_window = 1000, ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1;

-- As on the compacted topic, the last of each kind and name counts.
CREATE TABLE IF NOT EXISTS controls_raw (
    kind LowCardinality(String),
    name String,
    experiment_id LowCardinality(String),
    body String CODEC(ZSTD(1)),
    created_at DateTime64(9, 'UTC'),
    topic LowCardinality(String),
    partition Int32,
    offset Int64
) ENGINE = ReplacingMergeTree(created_at)
ORDER BY (kind, name)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS workers_raw (
    worker_id String,
    role LowCardinality(String),
    host LowCardinality(String),
    version LowCardinality(String),
    slots Int32,
    running Int32,
    started_at DateTime64(9, 'UTC'),
    last_seen DateTime64(9, 'UTC'),
    topic LowCardinality(String),
    partition Int32,
    offset Int64
) ENGINE = ReplacingMergeTree(last_seen)
ORDER BY worker_id
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS dead_letters_raw (
    source_topic LowCardinality(String),
    source_partition Int32,
    source_offset Int64,
    role LowCardinality(String),
    reason LowCardinality(String),
    error String CODEC(ZSTD(1)),
    time DateTime64(9, 'UTC'),
    key Nullable(String),
    value Nullable(String) CODEC(ZSTD(1)),
    headers Map(LowCardinality(String), String),
    written_at DateTime64(3, 'UTC'), -- the refused record's own timestamp
    topic LowCardinality(String),
    partition Int32,
    offset Int64
) ENGINE = ReplacingMergeTree
ORDER BY (source_topic, source_partition, source_offset, role, reason)
SETTINGS non_replicated_deduplication_window = 1000;
