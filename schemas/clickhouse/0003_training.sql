-- What a trainer has done, step by step. The log's first record of a step counts: a trainer that was killed sends its last
-- step again when it resumes, and then knows less about it.
CREATE TABLE IF NOT EXISTS training_steps_raw (
    experiment_id LowCardinality(String),
    run LowCardinality(String),
    epoch Int32,
    step Int32,
    model_version String CODEC(ZSTD(1)),
    started_at DateTime64(9, 'UTC'),
    ended_at DateTime64(9, 'UTC'),
    wait_s Float64,
    update_s Float64,
    save_s Float64,
    publish_s Float64,
    other_s Float64,
    reward_mean Nullable(Float64),
    reward_std Nullable(Float64),
    validation_reward Nullable(Float64),
    rollouts Int32,
    failed Int32,
    groups Int32,
    dropped Map(LowCardinality(String), Int64),
    staleness_mean Float64,
    staleness_max Int32,
    tokens Int64,
    metrics Map(LowCardinality(String), Float64),
    trained Array(String) CODEC(ZSTD(1)),
    restored_from String CODEC(ZSTD(1)),
    version Int64,
    topic LowCardinality(String),
    partition Int32,
    offset Int64
) ENGINE = ReplacingMergeTree(version)
ORDER BY (experiment_id, epoch, step)
SETTINGS non_replicated_deduplication_window = 1000;

-- One row per step of an epoch. `abandoned`: a later epoch began at or before it, so its weights are in no later version.
-- `idle_share`: of its time, the share in which the trainer waited for rollouts.
CREATE OR REPLACE VIEW training_steps AS
SELECT
    * EXCEPT (trained, version, topic, partition, offset),
    wait_s + update_s + save_s + publish_s + other_s AS seconds,
    if(seconds > 0, wait_s / seconds, NULL) AS idle_share,
    ifNull(step >= minOrNull(step) OVER (
        PARTITION BY experiment_id ORDER BY epoch RANGE BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING
    ), false) AS abandoned,
    trained,
    topic, partition, offset
FROM training_steps_raw FINAL;

-- The ledger: one row for each time that a rollout was trained on. With `NOT abandoned`, each rollout is there once.
CREATE OR REPLACE VIEW trained_rollouts AS
SELECT experiment_id, run, epoch, step, model_version, ended_at, abandoned, rollout_id
FROM training_steps
ARRAY JOIN trained AS rollout_id;
