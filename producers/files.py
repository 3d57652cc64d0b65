"""Files that are written once, as a whole or not at all, in a folder or any file system of fsspec. On this machine
only their owner may read them: they hold what agents saw, and what was learned from it."""

import os
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Protocol

from millstream.schemas.errors import ConfigError
from millstream.schemas.folders import PRIVATE_FILE, PRIVATE_FOLDER
from millstream.schemas.redaction import without_passwords


def private(path: str, flags: int) -> int:
    """An ``opener`` for `open`: a file that it creates belongs to its owner alone."""
    return os.open(path, flags, PRIVATE_FILE)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file of its owner's as a whole, and returns when it is on disk."""
    part = path.with_name(f"{path.name}.{token_hex(4)}.part")
    try:
        with open(part, "wb", opener=private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Files(Protocol):
    """Files by their paths below a root. Raises what the file system raises."""

    def write(self, path: str, content: bytes) -> None:
        """Does nothing if the file exists."""

    def read(self, path: str) -> bytes: ...


def files_at(url: str) -> Files:
    """A folder, or the file system of ``PROTOCOL://``. Raises `ConfigError` if it is unusable."""
    return _Store(url) if "://" in url else _Folder(Path(url).absolute())


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, path: str, content: bytes) -> None:
        target = self._folder / path
        if target.exists():
            return
        self._folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)

    def read(self, path: str) -> bytes:
        return (self._folder / path).read_bytes()


class _Store:
    """An object store writes whole objects; ``create``: only if the object does not exist."""

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs

            self._files, self._root = url_to_fs(url)
        except ImportError as error:
            raise ConfigError(
                f"blob_url {without_passwords(url)} needs a package: {error}; pip install 'fsspec[s3]' for S3"
            ) from error
        except ValueError as error:
            raise ConfigError(f"blob_url {without_passwords(url)} can't be used: {error}") from error

    def write(self, path: str, content: bytes) -> None:
        where = f"{self._root.rstrip('/')}/{path}"
        if self._files.exists(where):
            return
        self._files.makedirs(where.rpartition("/")[0], exist_ok=True)
        with suppress(FileExistsError):  # another process was faster
            self._files.pipe_file(where, content, mode="create")

    def read(self, path: str) -> bytes:
        return bytes(self._files.cat_file(f"{self._root.rstrip('/')}/{path}"))
