"""Task inputs as people write them become JSON, or are refused first, by name."""

import dataclasses
import datetime as dt
import decimal
import enum
import json
import pathlib
import uuid
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from millstream.producers.task_input import task_input
from millstream.schemas.errors import ConfigError


@dataclasses.dataclass
class Point:
    x: int
    at: Any


class Model(pydantic.BaseModel):
    when: dt.date
    tags: set[str] = set()


class Color(enum.Enum):
    RED = "red"


UUID = uuid.UUID(int=7)
AT = dt.datetime(2026, 11, 30, 3, 45, tzinfo=dt.UTC)
CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
DEEP: Any = 0
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a 'word' é", "a 'word' é"),
        (None, None),
        (2**70, 2**70),
        (AT, "2026-11-30T03:45:00Z"),
        (AT.date(), "2026-11-30"),
        (dt.timedelta(seconds=5), "PT5S"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(1.5), 1.5),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (b"\xff\x00", "_wA="),
        (decimal.Decimal("1.10"), "1.10"),
        (UUID, str(UUID)),
        (pathlib.Path("/a/b"), "/a/b"),
        ({"x"}, ["x"]),
        (frozenset({1}), [1]),
        ((1, 2), [1, 2]),
        (Color.RED, "red"),
        (Model(when=AT.date(), tags={"t"}), {"when": "2026-11-30", "tags": ["t"]}),
        (Point(1, np.arange(2)), {"x": 1, "at": [0, 1]}),
        (
            {"a": [Point(1, {"m": Model(when=AT.date())})]},
            {"a": [{"x": 1, "at": {"m": {"when": "2026-11-30", "tags": []}}}]},
        ),
        ({1: "int keys become text"}, {"1": "int keys become text"}),
        (float("nan"), "NaN"),  # as wherever JSON is written
        ("half \ud83d", "half \ufffd"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_what_programs_hold_becomes_json(value: Any, text: Any) -> None:
    """Entry D3."""
    assert json.loads(task_input(value)) == text


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"question": [1, object()]}, "task 3.question[1] is a builtins.object, which is not JSON"),
        ({"f": {"g": lambda: 1}}, "task 3.f.g is a builtins.function"),
        ({"x": (n for n in range(3))}, "task 3.x is a builtins.generator, which is not JSON: it can be read only once"),
        ({"x": {(1, 2): 3}}, "task 3.x has the key (1, 2) of type tuple"),
        ({"p": Point(1, object())}, "task 3.p.at is a builtins.object"),
        (CIRCLE, "nested too deeply, or contains itself"),
        (DEEP, "nested too deeply, or contains itself"),
    ],
    ids=range(7),
)
def test_what_is_not_json_is_named(value: Any, says: str) -> None:
    """Entry D3: neither task nor field was named."""
    with pytest.raises(ConfigError) as raised:
        task_input(value, "task 3")
    assert says in str(raised.value)
