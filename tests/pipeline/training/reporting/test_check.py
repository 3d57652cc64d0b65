"""`millstream check`: what is left of a run agrees, or what does not is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

import torch
from resumable import Chain, agent, train

from millstream.pipeline.cli.main import app
from millstream.pipeline.models.policy import digest
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.pipeline.training import checkpoint
from millstream.pipeline.training.deployment import ANY_PORT
from millstream.pipeline.training.reporting.check import (
    _ledger,
    _served,
    check,
    checkpoint_findings,
    ledger_findings,
    position_findings,
    served_findings,
)
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError

pytestmark = pytest.mark.torch


def wrong(found: list[Any]) -> list[str]:
    return [f"{each.about}: {each.says}" for each in found if each.wrong]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder, Chain(), agent=agent, steps=4)
    return folder


def save(folder: Path, step: int, weights: dict[str, torch.Tensor], **extra: Any) -> checkpoint.Checkpoint:
    version = f"run.0.{step}"
    lineage = {"run": "run", "epoch": 0, "step": step, "ends": {}}
    known = {"name": "run", "model_version": version, "lineage": lineage, "experiment_id": "e"}
    return checkpoint.load(checkpoint.save(folder, step, {"weights": weights}, {0: 5}, known | extra))


async def test_a_run_that_has_ended_agrees(finished: Path) -> None:
    found = await check(finished, load_settings())
    assert wrong(found) == []
    said = {each.about: each.says for each in found}
    assert said["step-00000004"] == "complete; version run.0.4"
    assert said["steps"] == "1 to 4, each once"
    assert said["ledger"] == "each group was trained on once"


def test_the_command_ends_with_1_and_says_what_to_do(finished: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(finished)])
    assert (done.exit_code, "wrong" in done.stdout) == (0, False)
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    damaged = folder / "checkpoints" / "step-00000004" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    done = CliRunner().invoke(app, ["check", str(folder), "--json"])
    assert done.exit_code == 1
    (finding,) = [each for each in json.loads(done.stdout) if each["wrong"]]
    assert finding["about"] == "step-00000004"
    assert "digest differ" in finding["says"]
    assert "goes on from the one before" in finding["cure"]


async def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        await check(tmp_path, load_settings())
    (tmp_path / "experiment.json").write_text('{"experiment_id": "e"}')
    (finding,) = await check(tmp_path, load_settings())
    assert (finding.wrong, finding.says) == (False, "there are none: the run has not made one yet")


def test_each_checkpoint_is_read_as_a_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, {"w": torch.ones(1)})
    assert wrong(checkpoint_findings(tmp_path)[0]) == []
    (tmp_path / "step-00000001" / "state.pt").unlink()
    (tmp_path / "step-00000002" / "checkpoint.json").write_text("{")
    found, newest = checkpoint_findings(tmp_path)
    assert [each.about for each in found if each.wrong] == ["step-00000001", "step-00000002"]
    assert newest is not None
    assert newest.step == 3
    (tmp_path / "step-00000003" / "weights.safetensors").write_bytes(b"")
    assert checkpoint_findings(tmp_path)[1] is None


def test_a_checkpoint_of_another_version_than_its_step_is_named(tmp_path: Path) -> None:
    save(tmp_path, 3, {"w": torch.ones(1)}, model_version="run.0.2")
    assert wrong(checkpoint_findings(tmp_path)[0]) == ["step-00000003: is of step 3, and names version run.0.2"]


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        ({0: 5, 1: 9}, []),
        ({0: 3, 1: 4}, []),  # the first that is left, and one that nothing has been read of
        ({0: 2, 1: 4}, ["t partition 0: offsets 2 to 2 were deleted (retention) before they were trained on"]),
        ({1: 4}, ["t partition 0: offsets 0 to 2 were deleted (retention) before they were trained on"]),
        (
            {0: 3, 1: 10},
            ["t partition 1: position 10 lies after the end, 9: the topic is not the one of this run"],
        ),
    ],
)
def test_positions_lie_within_what_the_topic_holds(positions: dict[int, int], says: list[str]) -> None:
    assert wrong(position_findings(positions, {0: 3, 1: 4}, {0: 5, 1: 9}, "t")) == says


@pytest.mark.parametrize(
    ("steps", "twice", "saved", "every", "says"),
    [
        ([], [], 0, 1, []),
        ([1, 2, 3], [], 3, 1, []),
        ([1, 2, 3], [], 4, 1, []),  # killed between the checkpoint and the record: the next trainer sends it
        ([1, 2, 3, 4, 5], [], 4, 1, []),  # killed after a record and before its checkpoint
        ([1, 2, 3, 4, 5, 6, 7], [], 4, 4, []),
        ([1, 3, 4], [], 4, 1, ["steps: of 4 steps 2 are missing"]),
        ([5, 6], [], 6, 1, ["steps: of 6 steps 1, 2, 3 and 1 more are missing"]),
        ([1, 2, 2, 3], [], 3, 1, ["steps: two epochs both count for 2"]),
        ([1, 2], [], 4, 1, ["steps: the store ends at step 2, and the checkpoint is of step 4"]),
        ([], [], 2, 1, ["steps: the store ends at step 0, and the checkpoint is of step 2"]),
        (
            [1, 2, 3, 4, 5],
            [],
            2,
            1,
            ["steps: the store has step 5, and the last checkpoint is of step 2, of one every 1"],
        ),
        ([1, 2], [("g", [1, 2])], 2, 1, ["ledger: 1 groups were trained on twice: g by steps 1, 2"]),
    ],
)
def test_steps_follow_each_other_and_no_group_is_trained_on_twice(
    steps: list[int], twice: list[Any], saved: int, every: int, says: list[str]
) -> None:
    assert wrong(ledger_findings(steps, twice, saved, every)) == says


def test_a_group_that_two_steps_were_trained_on_is_found_in_the_store(folder: Path, tmp_path: Path) -> None:
    from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
    from millstream.consumers.sink.rows import to_rows
    from millstream.schemas.ids import new_id
    from millstream.schemas.wire.log import LogRecord, Partition
    from millstream.schemas.wire.records import Record, RolloutTask, TrainingStep

    settings = load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{new_id().replace('-', '')}")
    writer = ClickHouseWriter(settings)
    writer.migrate()
    ids = [new_id() for _ in range(4)]
    tasks = [
        RolloutTask(
            rollout_id=each,
            group_id=ids[0 if k < 2 else 2],
            group_size=2,
            input="1",
            experiment_id="e",
            created_at=1,
            timeout_s=1.0,
            lease_s=1.0,
        )
        for k, each in enumerate(ids)
    ]

    def insert(topic: str, *records: Record) -> None:
        logged = [LogRecord(Partition(topic, 0), at, 1, None, value) for at, value in enumerate(records)]
        for rows in to_rows(logged, "millstream.events")[0]:
            rows.insert(writer, new_id())

    def trained(step: int, epoch: int, *rollouts: str) -> TrainingStep:
        about = {"experiment_id": "e", "run": "run", "model_version": f"run.{epoch}.{step}"}
        return TrainingStep(step=step, epoch=epoch, started_at=1, ended_at=2, trained=rollouts, **about)

    saved = save(tmp_path, 2, {"w": torch.ones(1)})
    insert("millstream.tasks.normal", *tasks)
    insert("millstream.training", trained(1, 0, *ids[:2]), trained(2, 0, *ids[2:]))
    assert wrong(_ledger(saved, settings, 1)) == []
    insert("millstream.training", trained(3, 0, ids[1]))
    assert wrong(_ledger(saved, settings, 1)) == [f"ledger: 1 groups were trained on twice: {ids[0]} by steps 1, 3"]
    insert("millstream.training", trained(3, 1, *ids[:0]))  # abandons it
    assert wrong(_ledger(saved, settings, 1)) == []
    writer.close()


async def test_a_store_that_cannot_be_asked_is_not_taken_for_agreement(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("store"))
    (said,) = wrong(await check(folder, load_settings()))
    assert said.startswith("steps: the store can't be asked")


def test_served_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    saved = save(tmp_path, 2, {"w": torch.ones(2)})
    same, other = digest({"w": torch.ones(2)}), digest({"w": torch.zeros(2)})
    assert wrong(served_findings(saved, "run.0.2", same, "here")) == []
    assert wrong(served_findings(saved, "run.0.2", other, "here")) == [
        "served weights: here has other weights than the checkpoint under the name run.0.2"
    ]
    for version in ("run.0.3", "other.0.2", "0"):
        (finding,) = served_findings(saved, version, other, "here")
        assert (finding.wrong, "nothing to compare" in finding.says) == (False, True)


async def test_the_engine_says_which_weights_it_serves(tmp_path: Path) -> None:
    from examples.calculator import model
    from millstream.pipeline.models.engine import Engine
    from millstream.pipeline.models.engine_http import engine_app
    from millstream.pipeline.models.policy import parameters

    model.create(tmp_path / "model", 0)
    engine = Engine(tmp_path / "model", version="run.0.2")
    weights = {name: tensor.clone() for name, tensor in parameters(engine._model).items()}
    saved = save(tmp_path / "checkpoints", 2, weights)
    try:
        async with serve(engine_app(engine), ANY_PORT) as url:
            assert wrong(await _served(saved, tmp_path, url)) == []
            first = next(iter(weights))
            engine.load(weights | {first: weights[first] + 1}, "run.0.2")
            assert len(wrong(await _served(saved, tmp_path, url))) == 1
    finally:
        await engine.close()
    (finding,) = await _served(saved, tmp_path, "http://127.0.0.1:9")
    assert (finding.wrong, "no trainer serves there" in finding.says) == (False, True)


async def test_what_vllm_has_loaded_is_compared_too(tmp_path: Path) -> None:
    from millstream.pipeline.models import weight_files

    saved = save(tmp_path / "checkpoints", 2, {"w": torch.ones(2)})
    weight_files.save(tmp_path / "vllm" / "versions", {"w": torch.ones(2)}, "run.0.2")
    assert wrong(await _served(saved, tmp_path, None)) == []
    weight_files.save(tmp_path / "vllm" / "versions", {"w": torch.zeros(2)}, "run.0.2")
    assert len(wrong(await _served(saved, tmp_path, None))) == 1


def test_a_digest_tells_weights_apart() -> None:
    ones = {"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    assert digest(ones) == digest(dict(reversed(ones.items())))
    different = [
        {**ones, "a": torch.ones(3, 2)},
        {**ones, "a": torch.ones(2, 3, dtype=torch.float64)},
        {**ones, "b": torch.zeros(1, dtype=torch.bfloat16)},
        {"a": ones["a"]},
        {"c": ones["a"], "b": ones["b"]},
        {**ones, "a": torch.tensor(1.0)},
        {**ones, "a": torch.ones(0)},
    ]
    assert len({digest(each) for each in [ones, *different]}) == 8
