"""What it brings to ask for rollouts in advance: the same training with staleness 0, 1 and 4, in turns.

    python benchmarks/training.py [--quick] [--json FILE] [--seeds N]

The calculator learns as in the demo, but its model calls wait as real ones do: lognormal, mean 1 s, σ 1. Of each
schedule:

- ``s_per_step``; ``trainer_idle_share``, ``runner_idle_share``: of the run's time, and of that of all slots.
- ``staleness_mean``, ``staleness_max``, ``dropped_share``: of the groups.
- ``s_to_learn``: until the mean reward of five steps has reached 0.9 (not with --quick).

``async_to_sync_step`` and ``async_to_sync_wall`` compare staleness 4 with 0 by these times: medians over the seeds.
``control_reward``: the same with staleness 4 and a learning rate of 0.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import openai

import millstream as ms
from examples.calculator import model
from examples.calculator.tasks import make_tasks
from examples.calculator.tools import TOOLS
from millstream.pipeline.training.report import StepReport

SLOTS: Final = 256
WAIT_MEAN_S: Final = 1.0
QUICK: Final = 0.2  # of that, with --quick
SIGMA: Final = 1.0
STALENESS: Final = (0, 1, 4)
LEARNT: Final = 0.9
SCHEDULE: Final = {"groups_per_step": 8, "group_size": 8}


@cache
def client(loop: asyncio.AbstractEventLoop) -> openai.AsyncOpenAI:
    """One for all rollouts of a run: to make one takes longer than a call."""
    return openai.AsyncOpenAI(api_key="unused")


async def agent(task: dict[str, Any], rollout: Any) -> None:
    """As `examples.calculator.agent`, with calls that take their time."""
    waits = random.Random(rollout.seed)
    ask = client(asyncio.get_running_loop()).chat.completions.create
    result, *operands = task["numbers"]
    messages: list[Any] = []
    for step, part in enumerate(task["question"].split(" then ")):
        asked = f"result {result} . then {part} ?" if step else f"{part} ?"
        messages.append({"role": "user", "content": asked})
        await asyncio.sleep(task["wait_s"] * waits.lognormvariate(-SIGMA * SIGMA / 2, SIGMA))
        answer = await ask(model="calculator", messages=messages, max_tokens=1)
        word = (answer.choices[0].message.content or "").strip()
        if word in TOOLS:
            result = TOOLS[word](result, operands[step])
        ms.emit_reward(0.5 * (word == task["tools"][step]))
        messages.append({"role": "assistant", "content": word})


def train(staleness: int, seed: int, steps: int, lr: float, wait_s: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model.create(Path(folder, "model"), seed)
        trainer = ms.Trainer(
            algorithm=ms.GRPO(Path(folder, "model"), max_staleness=staleness, lr=lr, seed=seed, **SCHEDULE),
            agent=agent,
            run_dir=Path(folder, "run"),
            max_steps=steps,
            stop_reward=LEARNT + 0.03,
            patience=5,
            seed=seed,
            settings=ms.load_settings(runner_concurrency=SLOTS),
        )
        summary = trainer.fit([{**task, "wait_s": wait_s} for task in make_tasks(2000, "train", seed)])
        store = ms.ClickHouseStore(ms.load_settings(clickhouse_dsn=f"chdb://{folder}/run/store"))
        ((busy,),) = store.sql("SELECT sum(duration_s) FROM rollouts").rows
        store.close()
    taken = [sum(step.phases.values()) for step in summary.steps]
    rewards = [step.reward for step in summary.steps]
    learnt = next((n for n in range(5, len(rewards) + 1) if statistics.fmean(rewards[n - 5 : n]) >= LEARNT), None)
    return {
        "s_per_step": sum(taken) / len(taken),
        "trainer_idle_share": sum(step.phases["wait"] for step in summary.steps) / sum(taken),
        "runner_idle_share": 1 - float(busy) / (SLOTS * sum(taken)),
        **of_groups(summary.steps),
        "s_to_learn": math.nan if learnt is None else sum(taken[:learnt]),
        "reward": statistics.fmean(rewards[-5:]),
    }


def of_groups(reports: Sequence[StepReport]) -> dict[str, float]:
    groups = sum(report.groups for report in reports)
    dropped = sum(sum(report.dropped.values()) for report in reports)
    return {
        "staleness_mean": statistics.fmean(report.staleness_mean for report in reports),
        "staleness_max": float(max(report.staleness_max for report in reports)),
        "dropped_share": dropped / (groups + dropped),
    }


def options(description: str | None, seeds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=seeds)
    return parser.parse_args()


def tell(
    found: Mapping[int, Sequence[dict[str, float]]], control: float, clock: str, given: argparse.Namespace
) -> None:
    """Prints the medians of each schedule's runs, and writes them. A quick run is too short to learn. ``clock``: what
    ``s_to_learn`` was measured with."""
    medians = {s: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for s, runs in found.items()}
    names = [name for name in medians[0] if not (given.quick and name.endswith("_to_learn"))]
    print(f"{'':20}" + "".join(f"{f'staleness {s}':>14}" for s in STALENESS))
    for name in names:
        print(f"{name:20}" + "".join(f"{medians[s][name]:14.3f}" for s in STALENESS))
    figures: dict[str, Any] = {f"staleness_{s}": {name: medians[s][name] for name in names} for s in STALENESS}
    figures["async_to_sync_step"] = medians[4]["s_per_step"] / medians[0]["s_per_step"]
    if not given.quick:
        figures[f"async_to_sync_{clock}"] = medians[4]["s_to_learn"] / medians[0]["s_to_learn"]
    figures["control_reward"] = control
    print({name: round(value, 3) for name, value in figures.items() if isinstance(value, float)})
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2))


def main() -> None:
    given = options(__doc__, seeds=3)
    steps, seeds, wait_s = (2, 1, WAIT_MEAN_S * QUICK) if given.quick else (120, given.seeds, WAIT_MEAN_S)
    found: dict[int, list[dict[str, float]]] = {staleness: [] for staleness in STALENESS}
    for seed in range(seeds):
        for staleness in STALENESS:
            found[staleness].append(train(staleness, seed, steps, 5e-4, wait_s))
    tell(found, train(STALENESS[-1], 0, min(steps, 15), 0.0, wait_s)["reward"], "wall", given)


if __name__ == "__main__":
    main()
