"""Weights and versions between the trainer's process, which owns the model server, and a verl job: files in one folder.

The job writes the weights of each step; the trainer serves them and appends a line to ``served.jsonl``. A step's
rollouts are asked for only when that line is there, so a version that trains is served, as in every run.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millstream.pipeline.algorithms.verl.config import WEIGHTS
from millstream.pipeline.training.groups import Lineage
from millstream.producers.files import private, write_atomically
from millstream.schemas.errors import MillstreamError


@dataclass(frozen=True, slots=True)
class ExchangePolicy:
    poll_s: float = 0.05  # a look into a folder, which costs microseconds; steps take seconds at least
    serve_s: float = 3600.0  # a model server may restart meanwhile, which takes a large model half an hour


@dataclass(frozen=True, slots=True)
class Served:
    """The weights of a step, by one start of a job, that are served. ``resources_id`` is what their rollouts are asked
    for with; ``lineage`` says which versions may be trained on from now on. ``stop``: the run has reached what it was
    for, so the job ends."""

    attempt: str
    step: int
    resources_id: str
    lineage: Mapping[str, Any]
    stop: bool = False


class Exchange:
    """The folder of one run's jobs; ``attempt`` is the start of the job that it is used for."""

    def __init__(self, folder: Path, attempt: str, policy: ExchangePolicy = ExchangePolicy()) -> None:
        self.policy = policy
        self._attempt = attempt
        self._weights = folder / "weights" / attempt
        self._trained = folder / "trained" / attempt
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
        return max(self._steps(), default=None)

    def remove_before(self, step: int) -> None:
        """Removes the weights of earlier steps of this start: they are served no longer."""
        for earlier in self._steps():
            if earlier < step:
                path = self.weights_of(earlier)
                path.unlink()
                path.parent.rmdir()

    def note_trained(self, step: int, rollouts: Mapping[str, Sequence[str]]) -> None:
        """Called in the job: the ids of the rollouts that a step trains on, by the uid of their group."""
        self._trained.mkdir(parents=True, exist_ok=True)
        write_atomically(self._trained / f"step-{step:08d}.json", json.dumps(rollouts).encode())

    def trained(self, step: int) -> dict[str, list[str]]:
        """See `note_trained`."""
        found: dict[str, list[str]] = json.loads((self._trained / f"step-{step:08d}.json").read_bytes())
        return found

    def acknowledge(self, step: int, resources_id: str, lineage: Lineage, stop: bool = False) -> None:
        """Called in the trainer's process once the weights of a step are served."""
        line = json.dumps(asdict(Served(self._attempt, step, resources_id, lineage.to_json(), stop)))
        with open(self._served, "ab", buffering=0, opener=private) as file:
            file.write(line.encode() + b"\n")
            os.fsync(file.fileno())

    def served(self) -> list[Served]:
        """Everything that was ever served, in order."""
        if not self._served.exists():
            return []
        lines = self._served.read_text("utf-8").split("\n")[:-1]  # the last one may be being written
        return [Served(**json.loads(line)) for line in lines]

    def served_by(self, attempt: str, step: int) -> Served | None:
        """What a start of the job has asked for rollouts with, after its updates up to a step."""
        return next((each for each in reversed(self.served()) if (each.attempt, each.step) == (attempt, step)), None)

    def lineage(self) -> Lineage:
        """Of the version that is served now."""
        return Lineage.from_json(self.served()[-1].lineage)

    def wait_until_served(self, step: int) -> Served:
        """Blocks until the weights of a step of this start are served. Raises `MillstreamError` after the policy's
        time."""
        deadline = time.monotonic() + self.policy.serve_s
        while (found := self.served_by(self._attempt, step)) is None:
            if time.monotonic() > deadline:
                late = f"were not served within {self.policy.serve_s:g} s"
                raise MillstreamError(f"the weights of step {step} ({self.weights_of(step)}) {late}")
            time.sleep(self.policy.poll_s)
        return found

    def _steps(self) -> list[int]:
        return [int(path.parent.name.removeprefix("step-")) for path in self._weights.glob(f"step-*/{WEIGHTS}")]
