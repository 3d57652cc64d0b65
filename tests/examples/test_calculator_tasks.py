import json
import re
import subprocess
import sys
from itertools import product
from typing import Any

from examples.calculator.tasks import FIRST, NUMBERS, SECOND, make_tasks

MANY = 20_000  # enough to meet every combination of numbers and of phrasings


def shape(task: dict[str, Any]) -> str:
    """The question without its numbers."""
    return re.sub(r"\d+", "N", task["question"])


def test_validation_shares_neither_numbers_nor_phrasings_with_training() -> None:
    train, val = make_tasks(MANY, "train"), make_tasks(MANY, "val")
    assert not {tuple(task["numbers"]) for task in train} & {tuple(task["numbers"]) for task in val}
    assert not {shape(task) for task in train} & {shape(task) for task in val}
    assert {shape(task) for task in train} | {shape(task) for task in val} == {
        re.sub(r"\{\w\}", "N", f"{first} then {second}")
        for firsts, seconds in product(FIRST.values(), SECOND.values())
        for first, second in product(firsts, seconds)
    }


def test_training_knows_every_word_number_and_phrasing_of_validation() -> None:
    train, val = make_tasks(MANY, "train"), make_tasks(MANY, "val")
    assert {word for task in val for word in task["question"].split()} <= {
        word for task in train for word in task["question"].split()
    }
    for place in range(3):
        assert {task["numbers"][place] for task in train} == set(NUMBERS)
    for half in range(2):
        assert {shape(task).split(" then ")[half] for task in val} == {
            shape(task).split(" then ")[half] for task in train
        }


def test_both_sets_ask_for_all_pairs_of_tools() -> None:
    tools = set(product(FIRST, SECOND))
    for mode in ("train", "val"):
        assert {tuple(task["tools"]) for task in make_tasks(2000, mode)} == tools  # type: ignore[arg-type]


def test_a_question_says_what_its_task_is() -> None:
    task = next(task for task in make_tasks(MANY) if task["question"].startswith("subtract"))
    x, y, z = task["numbers"]
    assert task["question"].startswith(f"subtract {y} from {x} then ")
    assert str(z) in task["question"].split(" then ")[1]
    assert task["tools"][0] == "subtract"


def test_the_seed_decides() -> None:
    assert make_tasks(50, seed=3) == make_tasks(50, seed=3)
    assert make_tasks(50, seed=3) != make_tasks(50, seed=4)


def test_the_command_prints_lines_to_publish() -> None:
    command = [sys.executable, "-m", "examples.calculator.tasks", "--count", "3", "--mode", "val", "--seed", "2"]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert [json.loads(line) for line in out.splitlines()] == [
        {"input": task, "mode": "val"} for task in make_tasks(3, "val", 2)
    ]
