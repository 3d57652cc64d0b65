"""Whether what is left of a run agrees: its checkpoints, the log, the steps in the store, and what is served."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.models.policy import digest
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.training.checkpoint import Checkpoint, CheckpointDamaged, checkpoints, load
from millstream.pipeline.training.groups import Lineage
from millstream.pipeline.training.reporting.record import RECORD
from millstream.pipeline.training.run import CHECKPOINTS, read_record
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError, LogError, StoreError
from millstream.schemas.wire.log import Partition

SHOWN: Final = 3  # examples in one finding

STEPS: Final = """
SELECT step FROM training_steps WHERE experiment_id = {id:String} AND NOT abandoned ORDER BY step
"""
# Groups that more than one step was trained on, and rollouts that one step names twice.
TWICE: Final = """
SELECT g.group_id AS group_id, arraySort(groupUniqArray(t.step)) AS steps
FROM trained_rollouts AS t
INNER JOIN (SELECT DISTINCT rollout_id, group_id FROM tasks WHERE experiment_id = {id:String}) AS g
    ON g.rollout_id = t.rollout_id
WHERE t.experiment_id = {id:String} AND NOT t.abandoned
GROUP BY group_id
HAVING length(steps) > 1 OR count() > uniqExact(t.rollout_id)
ORDER BY group_id
LIMIT 100
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """``about`` says what was compared, ``says`` what came of it. ``cure``: what to do if it is ``wrong``."""

    about: str
    says: str
    wrong: bool = False
    cure: str = ""


@dataclass(frozen=True, slots=True)
class CheckPolicy:
    served_s: float = 60.0  # for the digest of a model that is answering requests


async def check(run_dir: Path, settings: Settings) -> list[Finding]:
    """Compares what is left of a run. Reads only. Raises `ConfigError` for a folder that is not one of a run."""
    record = read_record(run_dir / RECORD)
    found, newest = checkpoint_findings(run_dir / CHECKPOINTS)
    if not found and record is None:
        raise ConfigError(f"{run_dir} is not the folder of a run: it has neither {RECORD} nor {CHECKPOINTS}")
    if newest is None:
        return found or [Finding("checkpoints", "there are none: the run has not made one yet")]
    record = record or {}
    if record.get("log") == "memory":
        settings = settings.model_copy(update={"clickhouse_dsn": f"chdb://{(run_dir / 'store').resolve()}"})
        found.append(Finding("positions", "the log was in memory, and ended with the trainer: nothing to compare"))
    else:
        found += await _positions(newest, settings)
    every = int((record.get("arguments") or {}).get("checkpoint_every") or 1)
    found += _ledger(newest, settings, every)
    found += await _served(newest, run_dir, None if record.get("log") == "memory" else settings.model_url)
    return found


def checkpoint_findings(folder: Path) -> tuple[list[Finding], Checkpoint | None]:
    """Reads each checkpoint of a folder as a whole. The newest one is also returned if it can be read."""
    found: list[Finding] = []
    newest: Checkpoint | None = None
    for path in checkpoints(folder):
        try:
            newest = load(path)
            found.append(Finding(path.name, f"complete; version {newest.extra.get('model_version')}"))
        except CheckpointDamaged as error:
            newest = None
            cure = "restore it from a copy, or remove its folder: the run then goes on from the one before it"
            found.append(Finding(path.name, str(error).partition(". Restore")[0], True, cure))
    if newest is not None:
        found += own_findings(newest)
    return found, newest


def own_findings(saved: Checkpoint) -> list[Finding]:
    """Whether a checkpoint agrees with itself."""
    lineage = Lineage.from_json(saved.extra["lineage"])
    if (lineage.step, lineage.version) != (saved.step, saved.extra["model_version"]):
        says = f"is of step {saved.step}, and names version {saved.extra['model_version']}"
        return [Finding(saved.path.name, says, True, "remove its folder: the run then goes on from the one before it")]
    return []


def position_findings(
    positions: Mapping[int, int], first: Mapping[int, int], ends: Mapping[int, int], topic: str
) -> list[Finding]:
    """Whether a run's positions lie within what a topic holds: its first offsets and its ends, by partition."""
    found = []
    for partition in sorted(ends):
        at, place = positions.get(partition, 0), f"{topic} partition {partition}"
        if at > ends[partition]:
            says = f"position {at} lies after the end, {ends[partition]}: the topic is not the one of this run"
            cure = "check kafka_bootstrap_servers and topic_prefix; a run that goes on asks for its open rollouts anew"
            found.append(Finding(place, says, True, cure))
        elif at < first[partition]:
            says = f"offsets {at} to {first[partition] - 1} were deleted (retention) before they were trained on"
            cure = "a run that goes on runs what is missing of its open groups again; give the topic a longer retention"
            found.append(Finding(place, says, True, cure))
    return found or [Finding("positions", f"within what {topic} holds")]


def ledger_findings(
    steps: Sequence[int], twice: Sequence[tuple[str, Sequence[int]]], saved: int, every: int
) -> list[Finding]:
    """Whether the ``steps`` that count are 1, 2, … as far as the checkpoint of step ``saved``, and no group was trained
    on ``twice``. ``every``: steps between two checkpoints."""
    found = []
    counts = Counter(steps)
    last = max(counts, default=0)
    missing = [step for step in range(1, last) if step not in counts]
    repeated = [step for step, count in counts.items() if count > 1]
    sink = "see that the sink runs and has caught up (`millstream lag`); what it has not stored is on the log"
    if missing:
        found.append(Finding("steps", f"of {last} steps {_listed(missing)} are missing", True, sink))
    if repeated:
        cure = "two trainers have run with this folder: stop one, and go back to a checkpoint before (resume = …)"
        found.append(Finding("steps", f"two epochs both count for {_listed(repeated)}", True, cure))
    if last < saved - 1:
        says = f"the store ends at step {last}, and the checkpoint is of step {saved}"
        found.append(Finding("steps", says, True, sink))
    elif last > saved + 2 * every:
        says = f"the store has step {last}, and the last checkpoint is of step {saved}, of one every {every}"
        cure = "the folder's newest checkpoints are missing: restore them, or go on from this one, in a new epoch"
        found.append(Finding("steps", says, True, cure))
    if twice:
        listed = "; ".join(f"{group} by steps {_listed(by)}" for group, by in twice[:SHOWN])
        says = f"{len(twice)} groups were trained on twice: {listed}"
        cure = "go back to a checkpoint before the second step (resume = step-N): what came after is abandoned"
        found.append(Finding("ledger", says, True, cure))
    return found or [
        Finding("steps", f"1 to {last}, each once" if last else "none yet"),
        Finding("ledger", "each group was trained on once"),
    ]


def served_findings(saved: Checkpoint, version: str, sha256: str, where: str) -> list[Finding]:
    """Whether the weights of ``version``, with this digest, are those of the checkpoint, if they claim to be."""
    own = saved.extra["model_version"]
    if version == own and sha256 != digest(saved.algorithm_state["weights"]):
        says = f"{where} has other weights than the checkpoint under the name {own}"
        cure = "restart the trainer: it serves its checkpoint before it asks for rollouts"
        return [Finding("served weights", says, True, cure)]
    if version == own:
        return [Finding("served weights", f"{where} has those of the checkpoint, {own}")]
    if version.rsplit(".", 2)[0] != saved.extra["name"]:
        return [Finding("served weights", f"{where} has {version}, of another run: nothing to compare")]
    return [Finding("served weights", f"{where} has {version}; the checkpoint is of {own}: nothing to compare")]


async def _positions(saved: Checkpoint, settings: Settings) -> list[Finding]:
    topics = settings.topics
    partitions = [Partition(topics.triplets, number) for number in range(topics.partitions)]
    try:
        log = KafkaLog(settings)
        await log.check()
        consumer = log.consumer()
        try:
            await consumer.assign(partitions, "end")
            first = await consumer.beginning_offsets(partitions)
            ends = await consumer.end_offsets(partitions)
        finally:
            await consumer.close()
    except LogError as error:
        return [Finding("positions", f"the log can't be asked: {error}", True, "start it, and check again")]
    starts = {partition.number: offset for partition, offset in first.items()}
    stops = {partition.number: offset for partition, offset in ends.items()}
    return position_findings(saved.positions, starts, stops, topics.triplets)


def _ledger(saved: Checkpoint, settings: Settings, every: int) -> list[Finding]:
    asked = {"id": saved.extra["experiment_id"]}
    try:
        store = ClickHouseStore(settings)
        try:
            steps = [row[0] for row in store.sql(STEPS, asked).rows]
            twice = [(row[0], row[1]) for row in store.sql(TWICE, asked).rows]
        finally:
            store.close()
    except StoreError as error:
        return [Finding("steps", f"the store can't be asked: {error}", True, "see to it, and check again")]
    return ledger_findings(steps, twice, saved.step, every)


async def _served(saved: Checkpoint, run_dir: Path, url: str | None) -> list[Finding]:
    """The demo engine of a trainer that runs, at ``url``; what vLLM has loaded lies in the run's folder."""
    folder = run_dir / "vllm" / "versions" / saved.extra["model_version"]
    if folder.is_dir():
        from safetensors.torch import load_file

        from millstream.pipeline.models.weight_files import FILE

        try:
            sha256 = digest(load_file(folder / FILE))
        except (OSError, ValueError) as error:
            return [Finding("served weights", f"{folder} can't be read: {error}", True, "restart the trainer")]
        return served_findings(saved, saved.extra["model_version"], sha256, str(folder))
    if url is None:
        return [Finding("served weights", "the model was served within the trainer's process: nothing to compare")]
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(CheckPolicy().served_s)) as session,
            session.get(f"{url.rstrip('/')}/weights") as answer,
        ):
            answer.raise_for_status()
            found: Any = await answer.json()
            return served_findings(saved, str(found["model_version"]), str(found["sha256"]), url)
    except (aiohttp.ClientError, OSError, TimeoutError, json.JSONDecodeError, KeyError, TypeError):
        return [Finding("served weights", f"{url} does not name its weights (no trainer serves there now)")]


def _listed(values: Sequence[Any]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(map(str, values[:SHOWN])) + more
