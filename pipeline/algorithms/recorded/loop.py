"""The loop of algorithms that learn from recorded rollouts: they ask for none, except to validate."""

import asyncio
import logging
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from millstream.pipeline.algorithms.policy_gradient import BEST, CANDIDATE, LAST
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.training.report import StepReport
from millstream.pipeline.training.run import Run
from millstream.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Lesson:
    """A step's part of the data. ``learn`` updates the policy with it, and returns metrics."""

    learn: Callable[[], dict[str, float]]
    reward: float  # mean
    rollouts: int
    tokens: int  # that are learnt from


class FromRecords(ABC, Generic[Item]):
    """An `Algorithm`: goes ``epochs`` times over ``items``, in an order of the run's seed; a step trains on
    ``items_per_step`` of them. ``data`` is a digest of the items: a run goes on with the same alone. The other
    arguments are `PolicyGradient`'s. Without validation tasks nothing is rolled out, so neither agent nor model server
    is needed."""

    needs_tasks = False

    def __init__(
        self,
        learner: TorchLearner,
        items: Sequence[Item],
        data: str,
        *,
        epochs: int,
        items_per_step: int,
        validate_every: int = 0,
        checkpoint_every: int = 1,
        keep_checkpoints: int = 3,
    ) -> None:
        self.learner, self.items, self.data = learner, items, data
        self.epochs, self.items_per_step = epochs, items_per_step
        self.validate_every = validate_every
        self.checkpoint_every, self.keep_checkpoints = checkpoint_every, keep_checkpoints

    @abstractmethod
    def lesson(self, items: Sequence[Item]) -> Lesson: ...

    @property
    def model(self) -> Path:
        return self.learner.model

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(len(self.items) / self.items_per_step)

    async def run(self, run: Run) -> None:
        """See `Algorithm.run`. Raises `ConfigError` if the run goes on with other data, FloatingPointError."""
        await _Fitting(self, run).run()

    def batch(self, step: int, seed: int) -> list[Item]:
        """The items of a step."""
        epoch, place = divmod(step, self.steps // self.epochs)
        order = list(range(len(self.items)))
        random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 - nothing is to be kept secret
        return [self.items[i] for i in order[place * self.items_per_step : (place + 1) * self.items_per_step]]


@dataclass
class _Fitting:
    config: FromRecords[Any]
    on: Run
    step: int = 0
    best: float | None = None
    validated: float | None = None  # since the last report

    async def run(self) -> None:
        config, stop = self.config, self.on.experiment.stop
        last = min(config.steps, stop.max_steps)
        if last < config.steps:
            logger.warning("max_steps ends the run after %d of %d steps", last, config.steps)
        if (restored := self.on.restored) is not None:
            state = restored.extra["loop"]
            if state["data"] != config.data:
                raise ConfigError(f"{restored.path} was made with other data: give the new data a run_dir of its own")
            await asyncio.to_thread(config.learner.load_state, restored.algorithm_state)
            self.step, self.best = restored.step, state["best"]
        else:
            await self._checkpoint()
        self.on.lineage.step = self.step
        while self.step < last:
            await self._step()
            if config.validate_every and self.step % config.validate_every == 0 and self.step < last:
                await self._validate()
        await self._validate()
        await self.on.export(config.learner.weights(), config.model, LAST)

    async def _step(self) -> None:
        began, config = time.monotonic(), self.config
        lesson = config.lesson(config.batch(self.step, self.on.seed))
        with self.on.watch.phase("update"):
            metrics = await asyncio.to_thread(lesson.learn)
        report = StepReport(
            step=self.step,
            model_version=self.on.lineage.version,
            reward=lesson.reward,
            rollouts=lesson.rollouts,
            failed=0,
            rollouts_per_second=0.0,
            spans=0,
            seconds=time.monotonic() - began,
            metrics=metrics,
            epoch=self.on.lineage.epoch,
            validation_reward=self.validated,
            tokens=lesson.tokens,
        )
        self.on.add(report)
        self.step, self.validated = self.step + 1, None
        if self.step % config.checkpoint_every == 0:
            await self._checkpoint()
        await self.on.tell()
        self.on.lineage.step = self.step

    async def _checkpoint(self) -> None:
        config = self.config
        state: dict[str, Any] = {"data": config.data, "best": self.best}
        await self.on.checkpoint(
            self.step, config.learner.state(), state, keep=config.keep_checkpoints, wait=config.checkpoint_every == 1
        )

    async def _validate(self) -> None:
        if not self.on.experiment.val_tasks:
            return
        await self.on.publish_weights(self.config.learner.weights(), self.step)
        with self.on.watch.phase("wait"):
            self.validated = await self.on.validate()
        if self.best is None or self.validated > self.best:
            self.best = self.validated
            await self.on.export(self.config.learner.weights(), self.config.model, CANDIDATE)
            await self.on.keep(CANDIDATE, BEST)
