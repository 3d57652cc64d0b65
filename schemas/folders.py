"""Folders that commands create, and may empty only if they have created them. Only their owner may read them: they hold
what agents saw, and what was learned from it. A folder that exists keeps its permissions: create it first to share it
with a group.
"""

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from millstream.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600
MARK = ".millstream"  # a file that names what the folder was created for
HOLDER = ".held"  # a file that is locked, and names who holds the folder


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


@contextmanager
def held_folder(folder: Path, name: str) -> Iterator[None]:
    """Holds a folder against others that hold it, here or in another process; a process that dies lets go of it. Where
    files can't be locked, nothing is held. ``name``: the setting or option that names it.

    Raises `ConfigError` if it is held.
    """
    with (folder / HOLDER).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{name} {folder} is in use by process {file.read().strip()}: wait for its end, or choose another one"
            ) from None
        except OSError as error:
            logger.warning("%s %s can't be locked (%s): nothing else may write there", name, folder, error.strerror)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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
