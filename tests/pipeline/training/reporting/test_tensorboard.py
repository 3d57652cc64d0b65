"""Steps as TensorBoard events."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from millstream.pipeline.training.config import load_config
from millstream.pipeline.training.report import StepReport
from millstream.pipeline.training.reporting.tensorboard import FOLDER, scalars, tensorboard
from millstream.schemas.errors import ConfigError

pytestmark = pytest.mark.torch


def report(step: int, **fields: Any) -> StepReport:
    values: dict[str, Any] = {"model_version": "run.0.0", "reward": 0.5, "rollouts": 8, "failed": 1, "spans": 3}
    values |= {"rollouts_per_second": 2.0, "seconds": 4.0, "metrics": {"kl": 0.1, "odd": "text", "nan": math.nan}}
    return StepReport(step=step, **values | fields)


def test_the_numbers_of_a_step_have_tags() -> None:
    found = scalars(report(0, phases={"wait": 3.0, "update": 1.0}, dropped={"too_old": 2}))
    assert found["reward/mean"] == 0.5
    assert found["learner/kl"] == 0.1
    assert (found["time/wait"], found["time/idle_share"], found["dropped/too_old"]) == (3.0, 0.75, 2.0)
    assert math.isnan(found["learner/nan"])
    assert "learner/odd" not in found
    assert "reward/validation" not in found


def test_without_the_package_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"\[report\] tensorboard needs a package .*: pip install tensorboard"):
        tensorboard(tmp_path)


def test_a_training_file_asks_for_it(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text('tasks = "t"\n[report]\ntensorboard = true\n[grpo]\nmodel = "m"\n')
    assert load_config(file).report.tensorboard
    file.write_text('tasks = "t"\n[report]\ntensorbord = true\n[grpo]\nmodel = "m"\n')
    with pytest.raises(ConfigError, match=r"report\.tensorbord: Extra"):
        load_config(file)


def test_a_trainer_that_goes_on_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = tensorboard(tmp_path)
    for step in range(3):
        first(report(step, reward=float(step)))
    second = tensorboard(tmp_path)
    second(report(2, reward=9.0))
    events = EventAccumulator(str(tmp_path / FOLDER))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("reward/mean")] == [(1, 0.0), (2, 1.0), (3, 9.0)]
