"""A model's weights on disk: only safetensors, below one folder, with checksums."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from millstream.schemas.errors import ConfigError
from millstream.schemas.folders import PRIVATE_FILE, PRIVATE_FOLDER

if TYPE_CHECKING:  # needs the `train` extra
    from torch import Tensor

ADAPTER: Final = "adapter_model.safetensors"
FILE: Final = "model.safetensors"
VERSION: Final = re.compile(r"[\w-]+\.\d+\.\d+")  # run.epoch.step
PICKLED: Final = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}  # loading such a file runs the code in it


@dataclass(frozen=True, slots=True)
class Weights:
    """One version of a model, as a folder of safetensors. ``version`` is ``run.epoch.step``."""

    version: str
    folder: Path

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def checksums(self) -> dict[str, str]:
        """SHA-256 by path. Reads all files."""
        found = {}
        for file in self.files:
            with file.open("rb") as opened:
                found[str(file)] = hashlib.file_digest(opened, "sha256").hexdigest()
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor, by name. Reads only the headers. Raises `ConfigError` if a file can't be read."""
        from safetensors import SafetensorError, safe_open

        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="np") as opened:
                    shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{file} can't be read: {error}") from error
        return shapes


def allowed(folder: str | Path, root: Path, version: str, *, lora: bool = False) -> Weights:
    """The weights of a folder below ``root``. Raises `ConfigError` if the folder lies elsewhere (links are followed),
    or holds no safetensors, or anything that is not safe to load."""
    place = Path(folder).resolve()
    if not place.is_relative_to(root.resolve()):
        raise ConfigError(f"{folder} does not lie below {root} (setting weights_root), where weights may come from")
    if not place.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    for file in place.iterdir():
        if file.suffix in PICKLED:
            raise ConfigError(f"{folder} holds {file.name}, but only safetensors are loaded: move it elsewhere")
        if not file.resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"{folder}: {file.name} links to a file that does not lie below {root}")
    weights = Weights(version, place)
    if lora and not (place / ADAPTER).is_file():
        raise ConfigError(f"{folder} is not a LoRA adapter: it has no {ADAPTER}")
    if not weights.files or (not lora and (place / ADAPTER).is_file()):
        raise ConfigError(f"{folder} holds no safetensors of a whole model; an adapter is deployed with --lora")
    return weights


def check_fit(given: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ConfigError` naming tensors that are missing, unknown, or of another shape. A tensor that an update omits
    would silently keep its old values."""
    wrong = sorted(given.keys() ^ own.keys()) or sorted(name for name in own if own[name] != given[name])
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(f"the weights do not fit the model: {', '.join(wrong[:3])}{more}")


def save(folder: Path, tensors: Mapping[str, "Tensor"], version: str) -> Weights:
    """Writes them. A folder is complete or does not exist."""
    from safetensors.torch import save_file

    place, unfinished = folder / version, folder / f".{version}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(PRIVATE_FOLDER, parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / FILE)
    (unfinished / FILE).chmod(PRIVATE_FILE)
    shutil.rmtree(place, ignore_errors=True)
    unfinished.rename(place)
    return Weights(version, place)


def prune(folder: Path, keep: Iterable[Weights]) -> None:
    """Removes all other versions that `save` wrote, and nothing else that the folder may hold."""
    kept = {weights.folder for weights in keep}
    for place in folder.iterdir():
        if place not in kept and VERSION.fullmatch(place.name) and (place / FILE).is_file():
            shutil.rmtree(place)


def check_version(version: str) -> str:
    """Raises `ConfigError` unless it is ``run.epoch.step``."""
    if not VERSION.fullmatch(version):
        raise ConfigError(f"version {json.dumps(version)}: a version is run.epoch.step, as calculator.0.7")
    return version
