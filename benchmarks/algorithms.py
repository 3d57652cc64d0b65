"""How the algorithms learn: the calculator's held-out reward after so many steps, with the defaults of each type.

    python benchmarks/algorithms.py [--quick] [--json FILE] [--seeds N] [--type NAME …]

Steps of 16 questions with eight rollouts each, in virtual time (see virtual_time.py), one after the other: staleness 0.
Medians over the seeds. The control is GRPO with a learning rate of 0. One-token answers and two turns say little about
how the algorithms compare on other tasks; they show that each of them learns.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch
from pydantic import TypeAdapter
from virtual_time import play

from millstream.pipeline.algorithms.options import Rft, Torch, algorithm_of
from millstream.pipeline.algorithms.policy_gradient import PolicyGradient

STEPS: Final = (0, 5, 10, 15, 20, 30, 40)
LR: Final = 1e-3
TYPES: Final[dict[str, dict[str, Any]]] = {
    "control": {"type": "grpo", "lr": 0.0},
    "grpo": {},
    "dapo": {},
    "dr_grpo": {"norm_tokens": 1},
    "rloo": {},
    "reinforce_pp": {},
    "gspo": {},
    "cispo": {},
    "ppo": {},
    "rft": {"best_of_group": 1, "min_reward": 0.5},
}
OPTIONS: Final[TypeAdapter[Torch | Rft]] = TypeAdapter(Torch | Rft)


def make(name: str, seed: int, folder: Path) -> PolicyGradient:
    table = {"type": name, "lr": LR, "model": folder, "seed": seed} | TYPES[name]
    return cast(PolicyGradient, algorithm_of(OPTIONS.validate_python(table)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--type", action="append", choices=list(TYPES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    last, seeds = (1, 1) if given.quick else (STEPS[-1], given.seeds)
    shown = sorted({*(step for step in STEPS if step < last), last})
    print(f"{'held-out reward':16}" + "".join(f"{f'step {step}':>9}" for step in shown))
    figures: dict[str, dict[str, float]] = {}
    for name in given.type or TYPES:
        runs = [play(partial(make, name, seed), seed, last)[0].held_out for seed in range(seeds)]
        figures[name] = {f"step_{step}": statistics.median(run[step][1] for run in runs) for step in shown}
        print(f"{name:16}" + "".join(f"{reward:9.2f}" for reward in figures[name].values()), flush=True)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
