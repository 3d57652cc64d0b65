"""Checkpoints: one folder a step, which appears complete or not at all.

``step-00000042/`` holds ``weights.safetensors``, ``state.pt`` (optimizer, random state) and ``checkpoint.json`` (the
rest, with size and digest of the other two). An algorithm without weights has the last alone, and needs no torch.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from millstream.pipeline.models.weight_files import FILE, PICKLED
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.folders import PRIVATE_FILE, PRIVATE_FOLDER, make_folder
from millstream.schemas.ids import new_id

if TYPE_CHECKING:  # needs the `train` extra
    import torch

NAME: Final = re.compile(r"step-\d{8}")
WEIGHT_FILES: Final = {*PICKLED, ".safetensors", ".gguf"}
MANIFEST, WEIGHTS, STATE = "checkpoint.json", "weights.safetensors", "state.pt"


class CheckpointDamaged(MillstreamError):
    """A checkpoint differs from what was written. Names the folder and file, and what to do."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state to continue a run from. ``positions`` and ``extra`` are those that `save` was given."""

    path: Path
    step: int
    algorithm_state: dict[str, Any]
    positions: dict[int, int]
    extra: dict[str, Any]
    behind: bool = False  # the run had gone further


def save(
    folder: str | Path,
    step: int,
    algorithm_state: Mapping[str, Any],
    positions: Mapping[int, int],
    extra: Mapping[str, Any],
    keep: int = 3,
) -> Path:
    """Writes the checkpoint of a step to disk (synced), then removes all but the last ``keep``.

    ``algorithm_state["weights"]`` are tensors by name; the rest is tensors and plain data; empty: there are neither.
    ``positions`` are
    offsets by partition of the triplets topic: everything before them has been trained on. ``extra`` is JSON: what
    the run and its algorithm need besides.

    Raises `ConfigError` if the folder holds a later step: it belongs to another run.
    """
    folder = Path(folder)
    make_folder(folder, "run_dir")
    newest = max((_step(path) for path in checkpoints(folder)), default=-1)
    if newest > step:
        raise ConfigError(
            f"{folder} holds a checkpoint of step {newest}, later than step {step}: they are of different "
            "runs; use another folder for this run"
        )
    _clear_unfinished(folder)
    unfinished = folder / f".unfinished-{new_id()}"
    unfinished.mkdir(PRIVATE_FOLDER)
    if algorithm_state:
        _save_tensors(algorithm_state, unfinished)
    manifest = {
        "step": step,
        "positions": {str(partition): offset for partition, offset in positions.items()},
        "extra": dict(extra),
        "files": {file.name: _fingerprint(file) for file in sorted(unfinished.iterdir())},
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
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    _clear_unfinished(folder)
    return final


def load_latest(folder: str | Path) -> Checkpoint | None:
    """The checkpoint of the last step, or None if there is none.

    Raises `CheckpointDamaged` if it differs from what was written. Does not fall back to an older one: that would
    discard training, and hide that the disk lost data.
    """
    found = checkpoints(Path(folder))
    return load(found[-1]) if found else None


def restore(folder: Path, resume: str | Path) -> Checkpoint | None:
    """`find`, then later checkpoints are set aside."""
    found = find(folder, resume)
    if found is not None and found.behind:
        set_aside(folder, found.step)
    return found


def find(folder: Path, resume: str | Path) -> Checkpoint | None:
    """The checkpoint that a run with this folder goes on from. ``resume``: "auto", the last one, or None if there is
    none; "never", None; or a checkpoint's folder or its name, such as ``step-42``.

    Raises `ConfigError` with "never" if there are checkpoints, and for one that does not exist; `CheckpointDamaged`.
    """
    if resume == "auto":
        return load_latest(folder)
    found = checkpoints(folder)
    if resume == "never":
        if found:
            raise ConfigError(
                f"{folder} holds checkpoints of an earlier run: go on from them (resume = auto), or give this run "
                "another run_dir"
            )
        return None
    by_name = {f"step-{_step(path)}": path for path in found} | {path.name: path for path in found}
    path = by_name.get(str(resume), Path(resume))
    if not (path / MANIFEST).is_file():
        known = ", ".join(f"step-{_step(each)}" for each in found) or "none"
        raise ConfigError(f"resume = {resume}: there is no such checkpoint; {folder} has {known}")
    chosen = load(path)
    return replace(chosen, behind=bool(found) and _step(found[-1]) > chosen.step)


def go_back(folder: Path, gradual: bool = False) -> Checkpoint:
    """The last checkpoint of a folder, or, for a fault that is ``gradual``, the oldest that was kept; later ones are
    set aside as ``abandoned-…``. Raises `CheckpointDamaged`."""
    found = load(checkpoints(folder)[0 if gradual else -1])
    set_aside(folder, found.step)
    return found


def set_aside(folder: Path, step: int) -> None:
    """Renames the checkpoints of later steps: a run that goes on from ``step`` writes others."""
    for path in checkpoints(folder):
        if _step(path) > step:
            path.rename(folder / f"abandoned-{new_id()}-{path.name}")
    _sync(folder)


def load(path: Path) -> Checkpoint:
    """One checkpoint, by its folder. Raises `CheckpointDamaged`."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        for name, expected in manifest["files"].items():
            if _fingerprint(path / name) != expected:
                raise CheckpointDamaged(_damage(path / name, "size or digest differ from what was written"))
        return Checkpoint(
            path=path,
            step=manifest["step"],
            algorithm_state=_load_tensors(path) if manifest["files"] else {},
            positions={int(partition): offset for partition, offset in manifest["positions"].items()},
            extra=manifest["extra"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointDamaged(_damage(path, f"{type(error).__name__}: {error}")) from error


def _save_tensors(state: Mapping[str, Any], folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    rest = {key: value for key, value in state.items() if key != "weights"}
    save_file({name: tensor.contiguous() for name, tensor in state["weights"].items()}, folder / WEIGHTS)
    torch.save(rest, folder / STATE)


def _load_tensors(folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    rest = torch.load(folder / STATE, weights_only=True)  # does not run code from the file
    return {"weights": load_file(folder / WEIGHTS), **rest}


def export(weights: "Mapping[str, torch.Tensor]", model: Path, target: Path) -> None:
    """Writes a Hugging Face folder, which transformers loads and vLLM serves: ``model`` with these weights in place of
    its own. Replaces an earlier one as a whole. Other users may read it: it is made to be passed on."""
    from safetensors.torch import save_file

    part = target.with_name(f".unfinished-{new_id()}")
    part.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_FILES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, part / file.name)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, part / FILE, metadata={"format": "pt"})
    move(part, target)


def move(folder: Path, target: Path) -> None:
    """In place of what was there."""
    old = target.with_name(f".unfinished-{new_id()}")
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose tensors are copies, in the memory of the CPU."""
    import torch

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, Mapping):
            return {key: copy(each) for key, each in value.items()}
        return [copy(each) for each in value] if isinstance(value, list) else value

    return {key: copy(value) for key, value in state.items()}


def _damage(path: Path, what: str) -> str:
    return (
        f"checkpoint {path} is damaged ({what}). Restore it from a copy, or remove its step- folder to continue from "
        "the checkpoint before it"
    )


def checkpoints(folder: Path) -> list[Path]:
    """Their folders, by step. None if there is no such folder."""
    if not folder.is_dir():
        return []
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
