"""Writes TOML (1.0) of plain values, which Python only reads. Pure."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(values: Mapping[str, Any]) -> str:
    """A file with these values: strings, numbers, bools, lists, mappings. None is left out, since TOML has none.

    Raises TypeError for anything else."""
    return "\n".join(_lines(values)).strip("\n") + "\n"


def _lines(values: Mapping[str, Any], name: str = "") -> Iterator[str]:
    tables = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            tables[_key(key)] = value
        elif value is not None:
            yield f"{_key(key)} = {_value(value)}"
    for key, table in tables.items():
        whole = f"{name}.{key}" if name else key
        yield from ("", f"[{whole}]")
        yield from _lines(table, whole)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        pairs = [f"{_key(key)} = {_value(each)}" for key, each in value.items() if each is not None]
        return f"{{{', '.join(pairs)}}}"
    raise TypeError(f"{value!r} can't be written as TOML")


def _text(text: str) -> str:
    """A basic string: as JSON, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
