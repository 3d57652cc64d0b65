"""A run's checkpoint as a Hugging Face folder."""

from pathlib import Path

from millstream.pipeline.training.checkpoint import Checkpoint, checkpoints, export, load
from millstream.pipeline.training.reporting.record import RECORD, model_folder
from millstream.pipeline.training.run import CHECKPOINTS, read_record
from millstream.schemas.errors import ConfigError


def export_checkpoint(run_dir: Path, target: Path, version: str = "", base: Path | None = None) -> str:
    """Writes the checkpoint of a version, or with a name such as ``step-42`` (the last one by default), with the files
    of the Hugging Face folder ``base``, by default the model that the run began with. Returns the version.

    Raises `ConfigError` for a target that exists, an unknown version, or a model that is not where it was;
    `CheckpointDamaged`.
    """
    if target.exists():
        raise ConfigError(f"{target} exists: give the model a new folder")
    model = base or model_folder(read_record(run_dir / RECORD) or {})
    if model is None:
        raise ConfigError(f"{run_dir} does not say which model the run began with: give it with --model")
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model} is not a Hugging Face model folder: it has no config.json; give one with --model")
    found = _found(run_dir / CHECKPOINTS, version)
    export(found.algorithm_state["weights"], model, target)
    return str(found.extra["model_version"])


def _found(folder: Path, version: str) -> Checkpoint:
    paths = checkpoints(folder)
    if not paths:
        raise ConfigError(f"{folder} has no checkpoints")
    if not version:
        return load(paths[-1])
    step = version.removeprefix("step-") if version.startswith("step-") else version.rsplit(".", 1)[-1]
    named = {int(path.name.removeprefix("step-")): path for path in paths}
    found = load(named[int(step)]) if step.isdecimal() and int(step) in named else None
    if found is None or (not version.startswith("step-") and found.extra["model_version"] != version):
        known = ", ".join(f"step-{step}" for step in named)
        raise ConfigError(f"{folder} has no checkpoint of {version}; it has {known}")
    return found
