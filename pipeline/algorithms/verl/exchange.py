"""Weights and versions between the trainer's process, which owns the model server, and a verl job: files in one folder.

The job writes the weights of each step; the trainer serves them and appends a line to ``served.jsonl``. A step's
rollouts are asked for only when that line is there, so a version that trains is served, as in every run.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millstream.pipeline.algorithms.verl.config import WEIGHTS
from millstream.schemas.errors import MillstreamError
from millstream.schemas.folders import PRIVATE_FILE


@dataclass(frozen=True, slots=True)
class ExchangePolicy:
    poll_s: float = 0.05  # a look into a folder, which costs microseconds; steps take seconds at least
    serve_s: float = 3600.0  # a model server may restart meanwhile, which takes a large model half an hour


@dataclass(frozen=True, slots=True)
class Served:
    """A version that is served. ``stop``: the run has reached what it was for, so the job ends after this step."""

    attempt: str
    step: int
    version: str
    stop: bool = False


class Exchange:
    """The folder of one run's job; ``attempt`` is the start of the job that it is used for."""

    def __init__(self, folder: Path, attempt: str, policy: ExchangePolicy = ExchangePolicy()) -> None:
        self.policy = policy
        self._attempt = attempt
        self._weights = folder / "weights" / attempt
        self._served = folder / "served.jsonl"

    def weights_of(self, step: int) -> Path:
        """Where the weights of a step lie, complete or not at all."""
        return self._weights / f"step-{step:08d}" / WEIGHTS

    def write(self, step: int, tensors: Mapping[str, Any]) -> None:
        """Called in the job, by one of its processes. Tensors are on the CPU and contiguous."""
        from safetensors.torch import save_file

        path = self.weights_of(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(dict(tensors), part)
        part.replace(path)

    def newest(self) -> int | None:
        """The last step that has weights."""
        steps = [int(path.parent.name.removeprefix("step-")) for path in self._weights.glob(f"step-*/{WEIGHTS}")]
        return max(steps, default=None)

    def remove_before(self, step: int) -> None:
        """Removes the weights of earlier steps of this start: they are served no longer."""
        for path in self._weights.glob(f"step-*/{WEIGHTS}"):
            if int(path.parent.name.removeprefix("step-")) < step:
                path.unlink()
                path.parent.rmdir()

    def acknowledge(self, step: int, version: str, stop: bool = False) -> None:
        """Called in the trainer's process once the version is served."""
        line = json.dumps(asdict(Served(self._attempt, step, version, stop))) + "\n"
        descriptor = os.open(self._served, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def served(self) -> list[Served]:
        """Everything that was ever served, in order."""
        if not self._served.exists():
            return []
        lines = self._served.read_text().split("\n")[:-1]  # the last one may be being written
        return [Served(**json.loads(line)) for line in lines]

    def versions(self) -> dict[str, int]:
        """The step of each version that may be trained on. After a resume those that the run has gone back behind are
        none of them: their weights are lost, and what they have sampled belongs to the start that was given up."""
        steps: dict[str, int] = {}
        for each in self.served():
            steps = {version: step for version, step in steps.items() if step <= each.step} | {each.version: each.step}
        return steps

    def wait_until_served(self, step: int) -> Served:
        """Blocks until the weights of a step of this start are served. Raises `MillstreamError` after the policy's
        time."""
        deadline = time.monotonic() + self.policy.serve_s
        while True:
            for each in reversed(self.served()):
                if (each.attempt, each.step) == (self._attempt, step):
                    return each
            if time.monotonic() > deadline:
                late = f"were not served within {self.policy.serve_s:g} s"
                raise MillstreamError(f"the weights of step {step} ({self.weights_of(step)}) {late}")
            time.sleep(self.policy.poll_s)
