"""Folders that commands create, and may empty only if they have created them. Only their owner may read them: they hold
what agents saw, and what was learned from it. A folder that exists keeps its permissions: create it first to share it
with a group.
"""

import os
import shutil
from pathlib import Path

from millstream.schemas.errors import ConfigError

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600
MARK = ".millstream"  # a file that names what the folder was created for


def make_folder(folder: Path, name: str) -> Path:
    """Creates a folder unless it exists. ``name``: the setting or option that names it.

    Raises `ConfigError`.
    """
    try:
        folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} {folder}: the folder can't be created ({reason}); choose another one") from error
    return folder


def write_private(file: Path, text: str) -> None:
    """Writes a new file that only its owner may read."""
    with open(file, "x", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, PRIVATE_FILE)) as opened:
        opened.write(text)


def own_folder(folder: Path, name: str, purpose: str) -> Path:
    """A folder whose contents a command may replace: created and marked by this call, or by an earlier one for the
    same purpose.

    Raises `ConfigError` for any other folder that is not empty.
    """
    make_folder(folder, name)
    mark = folder / MARK
    if any(folder.iterdir()) and not (mark.is_file() and mark.read_text("utf-8", "replace").strip() == purpose):
        raise ConfigError(
            f"{name} {folder} holds files that are not of {purpose}, which would replace them; choose a new or an "
            "empty folder"
        )
    mark.write_text(f"{purpose}\n")
    return folder


def emptied_folder(folder: Path, name: str, purpose: str) -> Path:
    """`own_folder`, without what an earlier call left in it."""
    shutil.rmtree(own_folder(folder, name, purpose))
    return own_folder(folder, name, purpose)
