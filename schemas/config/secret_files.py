"""Secrets that settings name by the file that holds them: ``proxy_secret_file`` instead of ``proxy_secret``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from millstream.schemas.errors import ConfigError

SUFFIX: Final = "_file"
OTHERS: Final = 0o007  # permissions of everybody but the owner and the group


def with_files_read(values: Mapping[str, Any], secrets: frozenset[str]) -> dict[str, Any]:
    """The settings of one source, with the content of a file in place of its name. ``secrets``: names of the settings
    that may be given so. Raises `ConfigError` naming the setting if a file can't be read, is readable for everybody, or
    its secret is given as well."""
    found = dict(values)
    for name in secrets:
        if (path := found.pop(name + SUFFIX, None)) is not None:
            if name in found:
                raise ConfigError(f"{name} and {name}{SUFFIX} are both set: leave one of them out")
            found[name] = _read(name + SUFFIX, Path(path))
    return found


def readable_by_all(path: Path) -> bool:
    return bool(path.stat().st_mode & OTHERS)


def _read(setting: str, path: Path) -> str:
    """Without the line break at its end."""
    try:
        if readable_by_all(path):
            raise ConfigError(f"{setting} names {path}, which every user of this machine can read: chmod 600 {path}")
        text = path.read_text("utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} names {path}, which can't be read: {error}") from error
    if not text:
        raise ConfigError(f"{setting} names {path}, which is empty")
    return text
