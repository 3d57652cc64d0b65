-- One row per candidate of a search over prompts, refused ones included. `parent`: the resources version that it was made
-- from. Scores are means of rewards: on its minibatch, its parent's there, and on the validation batch. The rollouts that
-- ran with it have its `resources_id`; `rollout_id` is where its critique and edit were recorded.
CREATE OR REPLACE VIEW prompts AS
SELECT
    name AS resources_id,
    experiment_id,
    JSONExtractInt(body, 'number') AS number,
    JSONExtractInt(body, 'round') AS round,
    JSONExtractString(body, 'parent') AS parent,
    JSONExtractString(body, 'edited') AS edited,
    JSONExtractRaw(body, 'templates') AS templates,
    JSONExtractString(body, 'critique') AS critique,
    JSONExtractString(body, 'stage') AS stage,
    JSONExtractString(body, 'refused') AS refused,
    JSONExtract(body, 'parent_score', 'Nullable(Float64)') AS parent_score,
    JSONExtract(body, 'batch_score', 'Nullable(Float64)') AS batch_score,
    JSONExtract(body, 'score', 'Nullable(Float64)') AS score,
    JSONExtractString(body, 'rollout_id') AS rollout_id,
    created_at
FROM controls_raw FINAL
WHERE kind = 'prompt';
