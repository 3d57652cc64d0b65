"""A task's input as JSON text: JSON values, and what Python programs commonly hold instead of them."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from millstream.schemas.errors import ConfigError
from millstream.schemas.spans.text import json_text

NESTED = 100  # levels in which the field that is wrong is looked for


def task_input(value: Any, name: str = "input") -> str:
    """The JSON text of a task's input, by `json_text`. Takes JSON values, mappings, dataclasses, pydantic models,
    dates, UUIDs, decimals, paths, enums, sets, bytes (as base64), and arrays and numbers of NumPy and torch.

    Raises `ConfigError` that names the field by its path, ``name`` first, and says why it is not JSON.
    """
    try:
        return json_text(value, _plain)
    except ValueError as error:
        raise ConfigError(_culprit(value, name, NESTED) or f"{name} is not JSON: {error}") from error


def _plain(value: Any) -> Any:
    """One level of it in JSON's types. Raises ValueError."""
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump()
    if hasattr(value, "tolist"):  # NumPy, torch
        return value.tolist()
    if isinstance(value, set | frozenset):
        return list(value)
    if hasattr(value, "__next__"):
        raise ValueError("it can be read only once; make a list of it")
    return to_jsonable_python(value, bytes_mode="base64")


def _culprit(value: Any, path: str, levels: int) -> str | None:
    """The first part of a value that is not JSON."""
    if levels == 0:
        return f"{path[:100]}… is nested too deeply, or contains itself"
    if value is None or isinstance(value, str | int | float):
        return None
    if isinstance(value, dict):
        for key, each in value.items():
            if key is not None and not isinstance(key, str | int | float):
                return f"{path} has the key {key!r} of type {type(key).__name__}; JSON's keys are strings"
            if (found := _culprit(each, f"{path}.{key}", levels - 1)) is not None:
                return found
        return None
    if isinstance(value, list | tuple):
        parts = (_culprit(each, f"{path}[{at}]", levels - 1) for at, each in enumerate(value))
        return next((found for found in parts if found is not None), None)
    try:
        return _culprit(_plain(value), path, levels - 1)
    except Exception as error:  # from an object's own code, too
        kind = type(value)
        return f"{path} is a {kind.__module__}.{kind.__qualname__}, which is not JSON: {error}"
