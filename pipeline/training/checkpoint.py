"""Checkpoints: one folder a step, which appears complete or not at all.

``step-00000042/`` holds ``weights.safetensors``, ``state.pt`` (optimizer, random state) and ``checkpoint.json`` (the
rest, with size and digest of the other two).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.folders import PRIVATE_FILE, PRIVATE_FOLDER, make_folder
from millstream.schemas.ids import new_id

NAME: Final = re.compile(r"step-\d{8}")
MANIFEST, WEIGHTS, STATE = "checkpoint.json", "weights.safetensors", "state.pt"


class CheckpointDamaged(MillstreamError):
    """A checkpoint differs from what was written. Names the folder and file, and what to do."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state to continue a run from. ``positions`` and ``extra`` are those that `save` was given."""

    step: int
    algorithm_state: dict[str, Any]
    positions: dict[int, int]
    extra: dict[str, Any]


def save(
    folder: str | Path,
    step: int,
    algorithm_state: Mapping[str, Any],
    positions: Mapping[int, int],
    extra: Mapping[str, Any],
    keep: int = 3,
) -> Path:
    """Writes the checkpoint of a step to disk (synced), then removes all but the last ``keep``.

    ``algorithm_state["weights"]`` are tensors by name; the rest is tensors and plain data. ``positions`` are
    the next offsets by partition of the triplets topic: everything before them is collected. ``extra`` is JSON: tasks
    drawn, outstanding rollouts, model version.

    Raises `ConfigError` if the folder holds a later step: it belongs to another run.
    """
    folder = Path(folder)
    make_folder(folder, "run_dir")
    newest = max((_step(path) for path in _checkpoints(folder)), default=-1)
    if newest > step:
        raise ConfigError(
            f"{folder} holds a checkpoint of step {newest}, later than step {step}: they are of different "
            "runs; use another folder for this run"
        )
    _clear_unfinished(folder)
    unfinished = folder / f".unfinished-{new_id()}"
    unfinished.mkdir(PRIVATE_FOLDER)
    rest = {key: value for key, value in algorithm_state.items() if key != "weights"}
    save_file({name: tensor.contiguous() for name, tensor in algorithm_state["weights"].items()}, unfinished / WEIGHTS)
    torch.save(rest, unfinished / STATE)
    manifest = {
        "step": step,
        "positions": {str(partition): offset for partition, offset in positions.items()},
        "extra": dict(extra),
        "files": {name: _fingerprint(unfinished / name) for name in (WEIGHTS, STATE)},
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2), "utf-8")
    for path in unfinished.iterdir():
        path.chmod(PRIVATE_FILE)
        _sync(path)
    _sync(unfinished)
    final = folder / f"step-{step:08d}"
    if final.exists():  # the same step again
        final.rename(folder / f".unfinished-{new_id()}")
    unfinished.rename(final)
    _sync(folder)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    _clear_unfinished(folder)
    return final


def load_latest(folder: str | Path) -> Checkpoint | None:
    """The checkpoint of the last step, or None if there is none.

    Raises `CheckpointDamaged` if it differs from what was written. Does not fall back to an older one: that would
    discard training, and hide that the disk lost data.
    """
    found = _checkpoints(Path(folder)) if Path(folder).is_dir() else []
    return _load(found[-1]) if found else None


def _load(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        for name, expected in manifest["files"].items():
            if _fingerprint(path / name) != expected:
                raise CheckpointDamaged(_damage(path / name, "size or digest differ from what was written"))
        weights = load_file(path / WEIGHTS)
        rest = torch.load(path / STATE, weights_only=True)  # does not run code from the file
        return Checkpoint(
            step=manifest["step"],
            algorithm_state={"weights": weights, **rest},
            positions={int(partition): offset for partition, offset in manifest["positions"].items()},
            extra=manifest["extra"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointDamaged(_damage(path, f"{type(error).__name__}: {error}")) from error


def _damage(path: Path, what: str) -> str:
    return (
        f"checkpoint {path} is damaged ({what}). Restore it from a copy, or remove its step- folder to continue from "
        "the checkpoint before it"
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _clear_unfinished(folder: Path) -> None:
    for path in folder.glob(".unfinished-*"):
        shutil.rmtree(path)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
