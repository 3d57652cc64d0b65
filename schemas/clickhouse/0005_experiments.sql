-- One row per training run, with what it was started with. `configuration` is the whole record as JSON; `model` maps the
-- model's files to their SHA-256; `changes`: how often something else was different when the run went on.
CREATE OR REPLACE VIEW experiments AS
SELECT
    name AS experiment_id,
    JSONExtractString(body, 'run') AS run,
    JSONExtractString(body, 'algorithm') AS algorithm,
    JSONExtractRaw(body, 'arguments') AS arguments,
    JSONExtract(body, 'seed', 'Nullable(Int64)') AS seed,
    JSONExtractString(body, 'millstream') AS version,
    JSONExtractString(body, 'git', 'commit') AS git_commit,
    JSONExtract(body, 'git', 'dirty', 'Nullable(Bool)') AS git_dirty,
    JSONExtractString(body, 'tasks') AS tasks,
    JSONExtract(body, 'model', 'Map(String, String)') AS model,
    JSONLength(body, 'changes') AS changes,
    body AS configuration,
    created_at
FROM controls_raw FINAL
WHERE kind = 'experiment';
