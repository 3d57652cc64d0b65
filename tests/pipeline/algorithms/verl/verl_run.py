"""A trainer process for the tests: the calculator, trained by verl on this CPU, over Kafka.

``python verl_run.py FOLDER STEPS OPTIONS`` with the settings in the environment; prints a line of JSON for each version
that it serves and each step that it reports.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import millstream as ms
from examples.calculator import model
from examples.calculator.tasks import make_tasks
from millstream.pipeline.algorithms.verl.algorithm import Verl
from millstream.pipeline.models.engine import Engine
from millstream.pipeline.training.report import StepReport

OPTIONS: dict[str, Any] = {
    "groups_per_step": 8,
    "group_size": 8,
    "minibatch": 4,
    "epochs": 2,
    "lr": 1e-3,
    "entropy": 0.05,
    "device": "cpu",
    "dtype": "float32",
    "gpus_per_node": 1,
    "micro_batch": 16,
    "max_prompt": 64,
    "max_response": 64,
    "flash_attention": False,
    "save_every": 1000,
    "overrides": [
        "ray_kwargs.ray_init.num_gpus=2",  # in name only
        "ray_kwargs.ray_init.num_cpus=9",
        "ray_kwargs.ray_init.include_dashboard=false",
        "ray_kwargs.ray_init.object_store_memory=200000000",
    ],
}


def say(**entry: Any) -> None:
    print(json.dumps(entry), flush=True)


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Watched(Engine):
    async def update(self, weights: Mapping[str, torch.Tensor], version: str) -> None:
        await super().update(weights, version)
        say(version=version, digest=digest(weights), names=len(weights))


def on_step(report: StepReport) -> None:
    say(step=report.step, reward=report.reward, failed=report.failed, rollouts=report.rollouts, **report.metrics)


def main(folder: Path, steps: int, options: dict[str, Any]) -> None:
    import millstream.pipeline.models.engine as engine

    engine.Engine = Watched  # type: ignore[misc]
    logging.basicConfig(filename=folder / "log.txt", level="INFO")
    if not (folder / "model").exists():
        model.create(folder / "model")
    trainer = ms.Trainer(
        algorithm=Verl(folder / "model", **(OPTIONS | options)),
        agent="examples.calculator.agent:agent",
        strategy="kafka",
        run_dir=folder,
        max_steps=steps,
        on_step=on_step,
    )
    summary = trainer.fit(make_tasks(200), make_tasks(16, "val"))
    say(validation=summary.validation_reward, experiment_id=summary.experiment_id)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
