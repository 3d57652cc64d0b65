"""A checkpoint becomes a Hugging Face folder."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from examples.calculator import model
from millstream.pipeline.models.policy import load_model, load_tokenizer, parameters
from millstream.pipeline.training import checkpoint
from millstream.pipeline.training.reporting.export import export_checkpoint
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans.text import json_text

pytestmark = pytest.mark.torch


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With checkpoints of steps 1 and 2, whose weights are those of the model plus the step."""
    folder, base = tmp_path / "run", tmp_path / "model"
    model.create(base, 0)
    weights = parameters(load_model(base))
    for step in (1, 2):
        state = {"weights": {name: tensor + step for name, tensor in weights.items()}}
        folder.mkdir(exist_ok=True)
        checkpoint.save(folder / "checkpoints", step, state, {}, {"model_version": f"run.0.{step}"})
    record = {"experiment_id": "e", "arguments": {"learner": {"model": str(base)}}}
    (folder / "experiment.json").write_text(json_text(record))
    return folder


def first(folder: Path) -> torch.Tensor:
    return next(iter(parameters(load_model(folder)).values()))


@pytest.mark.parametrize(("version", "step"), [("", 2), ("step-1", 1), ("run.0.1", 1), ("step-00000002", 2)])
def test_any_checkpoint_can_be_exported(run: Path, tmp_path: Path, version: str, step: int) -> None:
    target = tmp_path / "out"
    assert export_checkpoint(run, target, version) == f"run.0.{step}"
    assert torch.equal(first(target), first(tmp_path / "model") + step)
    assert load_tokenizer(target).chat_template


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    for version in ("step-3", "run.0.3", "run.1.1", "nonsense", "step-x"):
        with pytest.raises(ConfigError, match=f"no checkpoint of {version}; it has step-1, step-2"):
            export_checkpoint(run, target, version)
    with pytest.raises(ConfigError, match="is not a Hugging Face model folder"):
        export_checkpoint(run, target, base=tmp_path)
    (run / "experiment.json").unlink()
    with pytest.raises(ConfigError, match="give it with --model"):
        export_checkpoint(run, target)
    with pytest.raises(ConfigError, match="has no checkpoints"):
        export_checkpoint(tmp_path, target, base=tmp_path / "model")
    assert not target.exists()
    assert export_checkpoint(run, target, base=tmp_path / "model") == "run.0.2"
    with pytest.raises(ConfigError, match="exists: give the model a new folder"):
        export_checkpoint(run, target, base=tmp_path / "model")
