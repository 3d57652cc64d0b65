"""Questions of two steps, such as "add 3 to 8 then times 2", in disjoint training and validation sets.

A task is ``{"question": str, "numbers": [8, 3, 2], "tools": ["add", "multiply"]}``. Validation questions use
number combinations *and* pairs of phrasings that training never sees, but no number or phrasing that is new by itself.
"""

import argparse
import itertools
import json
import random
from typing import Any, Literal

Mode = Literal["train", "val"]
Task = dict[str, Any]

NUMBERS = range(1, 10)

FIRST = {
    "add": ("add {y} to {x}", "{x} plus {y}", "the sum of {x} and {y}"),
    "subtract": ("subtract {y} from {x}", "{x} minus {y}", "take {y} from {x}"),
    "multiply": ("multiply {x} by {y}", "scale {x} by {y}", "the product of {x} and {y}"),
}
SECOND = {
    "add": ("put {z} more", "raise it by {z}", "append {z}"),
    "subtract": ("drop {z}", "less {z}", "reduce it by {z}"),
    "multiply": ("times {z}", "make it {z} fold", "stretch it by {z}"),
}

_FIRST = [(tool, phrase) for tool, phrases in FIRST.items() for phrase in phrases]
_SECOND = [(tool, phrase) for tool, phrases in SECOND.items() for phrase in phrases]


def _held_out_numbers(x: int, y: int, z: int) -> bool:
    return (x + 2 * y + 4 * z) % 5 == 0


def _held_out_phrasings(first: int, second: int) -> bool:
    return (first + 2 * second) % 7 == 0


def make_tasks(count: int, mode: Mode = "train", seed: int = 0) -> list[Task]:
    """``count`` tasks of one set; the same seed gives the same tasks. Some may repeat."""
    held_out = mode == "val"
    numbers = [n for n in itertools.product(NUMBERS, repeat=3) if _held_out_numbers(*n) == held_out]
    pairs = [
        (first, second)
        for (i, first), (j, second) in itertools.product(enumerate(_FIRST), enumerate(_SECOND))
        if _held_out_phrasings(i, j) == held_out
    ]
    rng = random.Random(f"{mode} {seed}")  # noqa: S311 — not for secrets
    tasks = []
    for _ in range(count):
        x, y, z = rng.choice(numbers)
        (first_tool, first), (second_tool, second) = rng.choice(pairs)
        question = f"{first.format(x=x, y=y)} then {second.format(z=z)}"
        tasks.append({"question": question, "numbers": [x, y, z], "tools": [first_tool, second_tool]})
    return tasks


def main() -> None:
    """Prints tasks as ``millstream publish`` reads them: one JSON object a line."""
    parser = argparse.ArgumentParser(prog="python -m examples.calculator.tasks", description=main.__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--mode", choices=["train", "val"], default="train")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for task in make_tasks(arguments.count, arguments.mode, arguments.seed):
        print(json.dumps({"input": task, "mode": arguments.mode}))


if __name__ == "__main__":
    main()
