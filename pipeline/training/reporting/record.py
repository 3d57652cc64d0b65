"""The record of an experiment: what a run was started with. Pure."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from millstream.schemas.redaction import without_passwords

RECORD: Final = "experiment.json"  # within a run's folder: the record, with the ``experiment_id``
PLAIN: Final = (str, int, float, bool, type(None), Path)
HIDDEN: Final = re.compile(r"password|passwd|secret|token$|api_?key", re.I)
# What another run of the same experiment must have in common with it, by the path in the record.
SAME: Final = ("model", "tasks", "val_tasks", "data", "schemas", "packages", "python", "git.commit")
SAME_SETTINGS: Final = ("triplets", "timeout_s", "retry_max_attempts", "retry_max_lost_attempts")


def algorithm_record(algorithm: Any) -> dict[str, Any]:
    """``algorithm``: its type, and ``arguments``: what it was made with, as JSON."""
    described = _described(algorithm)
    kind = type(algorithm).__name__
    if not isinstance(described, dict):
        return {"algorithm": kind, "arguments": {}}
    return {"algorithm": described.pop("type", kind), "arguments": described}


def model_folder(record: Mapping[str, Any]) -> Path | None:
    """The folder of the model that the run was started with."""
    arguments = record.get("arguments") or {}
    found = (arguments.get("learner") or {}).get("model") or arguments.get("model")
    return Path(found) if isinstance(found, str) else None


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects with their paths, such as ``arguments.lr``. Lists are values."""
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{name}.{key}" if name else str(key))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values in which two records differ, by their paths; None for one that is missing."""
    left, right = dict(flat(dict(a))), dict(flat(dict(b)))
    names = [name for name in left | right if name not in left or name not in right or left[name] != right[name]]
    return {name: (left.get(name), right.get(name)) for name in names}


def continued(before: Mapping[str, Any], now: Mapping[str, Any], at: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on: ``now``, with the ``changes`` of ``before``, and one more if they differ.
    ``at`` says when and where they began to."""
    changes = list(before.get("changes", ()))
    found = differences({k: v for k, v in before.items() if k != "changes"}, now)
    if found:
        changes.append({**at, "values": {name: list(values) for name, values in found.items()}})
    return {**now, "changes": changes} if changes else dict(now)


def obstacles(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why a run that is started now can't be the one of the record again: each difference that counts, as text."""
    found = []
    for name, (was, is_) in differences(_comparable(recorded), _comparable(now)).items():
        found.append(f"{name} was {_short(was)}, and is {_short(is_)}")
    return found


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    settings = record.get("settings") or {}
    values = {name: value for name, value in record.items() if name in SAME and value is not None}
    git = record.get("git") or {}
    return {
        **values,
        **({"git": {"commit": git["commit"]}} if "commit" in git else {}),
        "settings": {name: settings[name] for name in SAME_SETTINGS if name in settings},
    }


def _short(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 20 or not re.fullmatch("[0-9a-f]+", text) else f"{text[:12]}…"


def _described(value: Any, depth: int = 3) -> Any:
    """A value as JSON; an object as its type and what it was made with, as far as that can be seen. Values whose names
    suggest a secret are hidden."""
    if isinstance(value, str):
        return without_passwords(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, BaseModel):
        return _hidden(value.model_dump(mode="json"))
    if depth < 0:
        return type(value).__name__
    if isinstance(value, Mapping):
        return _hidden({str(key): _described(each, depth - 1) for key, each in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_described(each, depth - 1) for each in value]
    if hasattr(value, "__qualname__"):  # a function, a class
        return f"{value.__module__}:{value.__qualname__}"
    fields: dict[str, Any] = {}
    if depth > 0:
        fields = {name: _described(each, depth - 1) for name, each in _arguments(value).items()}
    return {"type": type(value).__name__, **_hidden(fields)}


def _arguments(value: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    given = getattr(value, "arguments", None)
    if isinstance(given, Mapping):
        return given
    public = {name: each for name, each in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    return {name: each for name, each in public.items() if isinstance(each, (*PLAIN, BaseModel))}


def _hidden(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "***" if each and HIDDEN.search(name) else each for name, each in fields.items()}
