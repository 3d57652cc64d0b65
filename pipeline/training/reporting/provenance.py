"""What a run depends on besides its arguments: digests of the model and the schemas, versions, the user's commit."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("millstream", "torch", "transformers", "tokenizers", "safetensors", "peft")
SERVERS: Final = ("vllm", "torch", "transformers")  # in the interpreter that runs vLLM
JOBS: Final = ("verl", "ray", "torch", "transformers")  # in verl's
_VERSIONS: Final = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(name, version(name))
    except PackageNotFoundError:
        pass
"""


@dataclass(frozen=True, slots=True)
class ProvenancePolicy:
    # Of git, or of another interpreter. A working tree on a slow disk holds up no run: its state is unknown then.
    process_s: float = 20.0


def provenance(
    model: Path | None, interpreters: Mapping[Path, Sequence[str]] = {}, folder: Path = Path()
) -> dict[str, Any]:
    """As in the record of an experiment: ``model`` is the SHA-256 of each file of that folder, ``schemas`` that of all
    Avro schemas, ``packages`` their versions here and, by its path, in each of ``interpreters``; ``git`` is what
    ``folder`` has checked out. Reads the whole model."""
    packages: dict[str, Any] = _installed(PACKAGES)
    for python, names in interpreters.items():
        packages[str(python)] = _installed_in(python, names)
    return {
        "model": None if model is None else digests(model),
        "schemas": _schemas(),
        "packages": packages,
        "python": sys.version.split()[0],
        "git": _git(folder),
    }


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, not of folders in it, by name. Empty if it can't be read."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file():
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@cache
def _schemas() -> str:
    folder = files("millstream.schemas").joinpath("avro")
    found = sorted((each for each in folder.iterdir() if each.name.endswith(".avsc")), key=lambda each: each.name)
    return hashlib.sha256(b"\n".join(each.read_bytes() for each in found)).hexdigest()


def _installed(names: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _installed_in(python: Path, names: Sequence[str]) -> dict[str, str] | None:
    """None if the interpreter does not run."""
    answer = _output([str(python), "-I", "-c", _VERSIONS, *names])
    return None if answer is None else dict(line.split(" ", 1) for line in answer.splitlines())


def _git(folder: Path) -> dict[str, Any] | None:
    """``commit``, and whether tracked files differ from it (``dirty``; None if that could not be found out). None
    outside of a repository with commits."""
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None:
        return None
    changes = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit.strip(), "dirty": None if changes is None else bool(changes.strip())}


def _output(command: Sequence[str], policy: ProvenancePolicy = ProvenancePolicy()) -> str | None:
    """None if the command is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=policy.process_s,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # `status` must not write into the user's repository
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout
