"""Training that shows what it was trained on: a learner whose weights are a chain of all rewards, in order, and which
keeps a ledger. Run as a script it is a trainer that can be killed at any moment, and started again."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import millstream as ms
from millstream.pipeline.training.groups import Group
from millstream.pipeline.training.report import Summary

TASKS = [{"number": n} for n in range(1000)]
SIZE, PER_STEP = 2, 3


def agent(task: dict[str, int]) -> float:
    time.sleep(0.02 if task["number"] % 7 else 0.2)  # some take longer
    return task["number"] / 1000


class Chain:
    """A `Learner`. ``ledger``: of each step, its rollouts by the number of their task."""

    model = None

    def __init__(self, update_s: float = 0.0) -> None:
        self.update_s = update_s
        self.weight = torch.tensor([0.5], dtype=torch.float64)
        self.ledger: list[dict[str, list[str]]] = []

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        time.sleep(self.update_s)
        for group in groups:
            for member in group.members:
                assert member.end.reward is not None
                self.weight = (self.weight * 3.7 + member.end.reward).frac()
        self.ledger.append(
            {f"{group.members[0].end.reward:.3f}": [m.end.rollout_id for m in group.members] for group in groups}
        )
        return {}

    def weights(self) -> dict[str, torch.Tensor]:
        return {"w": self.weight}

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights(), "ledger": [*self.ledger]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.weight = state["weights"]["w"]
        self.ledger = state["ledger"]


def train(run_dir: Path, learner: Any, *, steps: int = 6, max_staleness: int = 0, **options: Any) -> Summary:
    loop = {"checkpoint_every": options.pop("checkpoint_every", 1), "guards": options.pop("guards", ())}
    algorithm = ms.PolicyGradient(
        learner, groups_per_step=PER_STEP, group_size=SIZE, max_staleness=max_staleness, **loop
    )
    trainer = ms.Trainer(algorithm=algorithm, run_dir=run_dir, max_steps=steps, **options)
    return trainer.fit(TASKS)


def main(run_dir: str, given: str) -> None:
    learner, options = Chain(update_s=0.05), json.loads(given)
    print("started", flush=True)
    summary = train(Path(run_dir), learner, agent=None if options.get("strategy") == "kafka" else agent, **options)
    result = {"weight": learner.weight.item(), "ledger": learner.ledger, "steps": [s.step for s in summary.steps]}
    result["oldest"] = max(step.staleness_max for step in summary.steps)
    Path(run_dir, "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
