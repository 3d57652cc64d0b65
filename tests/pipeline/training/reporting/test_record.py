"""What the record of an experiment holds, and how two of them differ."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from millstream.pipeline.training.reporting.record import algorithm_record, continued, differences, obstacles


class Options(BaseModel):
    path: Path = Path("a/b")
    api_key: str = "sk-1"


def estimator() -> None: ...


class Learner:
    def __init__(self) -> None:
        self.lr, self.model, self.options = 0.1, Path("m"), Options()
        self.url = "http://user:hunter2@host/x"
        self._own = 1
        self.huge = object()


class Noted:
    def __init__(self) -> None:
        self.arguments = {"estimator": estimator, "clip": (0.2, 0.3), "password": "x", "inner": Inner()}


@dataclass
class Inner:
    rank: int = 3


@dataclass
class Loop:
    learner: Any
    guards: tuple[Any, ...] = (estimator,)


def test_an_algorithm_is_recorded_with_what_it_was_made_with() -> None:
    found = algorithm_record(Loop(Noted()))
    assert found["algorithm"] == "Loop"
    name = f"{__name__}:estimator"
    assert found["arguments"]["guards"] == [name]
    assert found["arguments"]["learner"] == {
        "type": "Noted",
        "estimator": name,
        "clip": [0.2, 0.3],
        "password": "***",
        "inner": {"type": "Inner", "rank": 3},
    }


def test_the_public_plain_values_of_any_object_are_recorded_and_no_secret_is() -> None:
    assert algorithm_record(Learner()) == {
        "algorithm": "Learner",
        "arguments": {
            "lr": 0.1,
            "model": "m",
            "options": {"path": "a/b", "api_key": "***"},
            "url": "http://user:***@host/x",
        },
    }


def test_objects_that_hold_each_other_are_recorded_to_a_depth() -> None:
    a = Loop(None)
    a.learner = Loop(a)
    text = str(algorithm_record(a))
    assert text.count("Loop") == 4
    endless: list[Any] = []
    endless.append(endless)
    assert "list" in str(algorithm_record(Loop(endless)))


def test_records_differ_by_path() -> None:
    a = {"x": {"lr": 1, "same": [1]}, "only": None}
    b = {"x": {"lr": 2, "same": [1]}, "new": 3}
    assert differences(a, b) == {"x.lr": (1, 2), "only": (None, None), "new": (None, 3)}


def test_a_run_that_goes_on_notes_what_has_changed_since() -> None:
    first = {"arguments": {"lr": 1}, "python": "3.11"}
    assert continued(first, dict(first), {"at": 1, "epoch": 0, "step": 2}) == first
    second = continued(first, {"arguments": {"lr": 2}, "python": "3.11"}, {"at": 1, "epoch": 0, "step": 2})
    assert second["arguments"] == {"lr": 2}
    change = {"at": 1, "epoch": 0, "step": 2, "values": {"arguments.lr": [1, 2]}}
    assert second["changes"] == [change]
    unchanged = continued(second, {"arguments": {"lr": 2}, "python": "3.11"}, {"at": 2, "epoch": 1, "step": 4})
    assert unchanged == second
    third = continued(second, first, {"at": 3, "epoch": 1, "step": 5})
    assert [each["step"] for each in third["changes"]] == [2, 5]


RECORD: dict[str, Any] = {
    "model": {"model.safetensors": "a" * 64, "config.json": "b" * 64},
    "tasks": "c" * 64,
    "val_tasks": "d" * 64,
    "schemas": "e" * 64,
    "packages": {"torch": "2.13.0", ".venv-vllm/bin/python": {"vllm": "0.9"}},
    "python": "3.11.9",
    "git": {"commit": "f" * 40, "dirty": True},
    "settings": {"timeout_s": 600.0, "triplets": {"credit": "last"}, "kafka_bootstrap_servers": "a:1"},
    "config": {"run_dir": "x"},
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"config.json": "b" * 64}}, "model.model.safetensors was aaaaaaaaaaaa…, and is missing"),
        ({"model": RECORD["model"] | {"new.json": "0" * 64}}, "model.new.json was missing, and is 000000000000…"),
        ({"tasks": "0" * 64}, "tasks was cccccccccccc…, and is 000000000000…"),
        ({"val_tasks": "0" * 64}, "val_tasks was dddddddddddd…"),
        ({"schemas": "0" * 64}, "schemas was eeeeeeeeeeee…"),
        ({"packages": RECORD["packages"] | {"torch": "2.14.0"}}, "packages.torch was 2.13.0, and is 2.14.0"),
        (
            {"packages": RECORD["packages"] | {".venv-vllm/bin/python": {"vllm": "1.0"}}},
            "packages..venv-vllm/bin/python.vllm was 0.9, and is 1.0",
        ),
        ({"python": "3.12.1"}, "python was 3.11.9, and is 3.12.1"),
        ({"git": {"commit": "0" * 40, "dirty": False}}, "git.commit was ffffffffffff…, and is 000000000000…"),
        ({"git": None}, "git.commit was ffffffffffff…, and is missing"),
        ({"settings": {"timeout_s": 5.0, "triplets": {"credit": "last"}}}, "settings.timeout_s was 600.0, and is 5.0"),
        ({"settings": {"timeout_s": 600.0, "triplets": {"credit": "all"}}}, "settings.triplets.credit was last"),
    ],
)
def test_what_a_reproduction_would_compute_from_something_else_is_named(change: dict[str, Any], says: str) -> None:
    (found,) = obstacles(RECORD, RECORD | change)
    assert found.startswith(says)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"config": {"run_dir": "y"}},
        {"git": {"commit": "f" * 40, "dirty": False}},
        {"settings": RECORD["settings"] | {"kafka_bootstrap_servers": "b:2"}},
        {"changes": [1]},
    ],
)
def test_a_reproduction_may_run_elsewhere(change: dict[str, Any]) -> None:
    assert obstacles(RECORD, RECORD | change) == []
