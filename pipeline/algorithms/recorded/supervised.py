"""Fine-tuning on recorded rollouts: an algorithm that asks for none, except to validate."""

import asyncio
import hashlib
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from millstream.pipeline.algorithms.policy_gradient import BEST, CANDIDATE, LAST, NothingToLearn
from millstream.pipeline.algorithms.recorded.imitation import ImitationLearner
from millstream.pipeline.algorithms.rows import Row
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.store.recorded import recorded_rollouts
from millstream.pipeline.training.datasets import Rollout, why_none
from millstream.pipeline.training.report import StepReport
from millstream.pipeline.training.run import Run
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.redaction import without_passwords
from millstream.schemas.wire.records import Triplet

logger = logging.getLogger(__name__)

NAMED: Final = 3  # reasons in a message


def recorded(
    settings: Settings, *, store: str | None, experiment: str | None, mode: str | None, sql: str | None
) -> list[list[Triplet]]:
    """See `recorded_rollouts`. ``store``: a DSN, by default the settings'. Raises `NothingToLearn` without any."""
    dsn = settings.clickhouse_dsn if store is None else store
    reading = ClickHouseStore(settings.model_copy(update={"clickhouse_dsn": dsn}))
    try:
        found = recorded_rollouts(reading, experiment=experiment, mode=mode, sql=sql)
    finally:
        reading.close()  # an embedded one, before the run opens its own
    if not found:
        searched = sql or f"experiment {experiment or 'any'}, mode {mode or 'any'}"
        raise NothingToLearn(
            f"{without_passwords(dsn)} holds no triplets of {searched}; `millstream rollouts` lists what there is"
        )
    return found


class Supervised:
    """An `Algorithm`: supervised fine-tuning. Goes ``epochs`` times over the rows of the chosen answers, in an order of
    the run's seed; a step trains on ``rows_per_step`` of them. The other arguments are `PolicyGradient`'s. Without
    validation tasks nothing is rolled out, and needs neither agent nor model server.

    Raises `NothingToLearn` with the commonest reason if no answer is chosen, or none can be learnt from."""

    needs_tasks = False

    def __init__(
        self,
        learner: ImitationLearner,
        rollouts: Sequence[Rollout],
        *,
        epochs: int = 3,
        rows_per_step: int = 512,
        validate_every: int = 0,
        checkpoint_every: int = 1,
        keep_checkpoints: int = 3,
    ) -> None:
        self.learner = learner
        self.rows, refused = learner.rows(rollouts)
        for reason, count in refused.most_common(NAMED):
            logger.warning("%d answers are not learnt: %s", count, reason)
        if not self.rows:
            raise NothingToLearn(refused.most_common(1)[0][0] if refused else why_none(rollouts, "those recorded"))
        self.epochs, self.rows_per_step = epochs, rows_per_step
        self.validate_every = validate_every
        self.checkpoint_every, self.keep_checkpoints = checkpoint_every, keep_checkpoints
        self.data = _digest(self.rows)
        self.arguments = {
            "learner": learner,
            "rows": len(self.rows),
            "epochs": epochs,
            "rows_per_step": rows_per_step,
            "validate_every": validate_every,
        }

    @property
    def model(self) -> Path:
        return self.learner.model

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(len(self.rows) / self.rows_per_step)

    async def run(self, run: Run) -> None:
        """See `Algorithm.run`. Raises `ConfigError` if the run goes on with other data, FloatingPointError."""
        await _Fitting(self, run).run()

    def batch(self, step: int, seed: int) -> list[Row]:
        """The rows of a step."""
        epoch, place = divmod(step, self.steps // self.epochs)
        order = list(range(len(self.rows)))
        random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 - nothing is to be kept secret
        return [self.rows[i] for i in order[place * self.rows_per_step : (place + 1) * self.rows_per_step]]


@dataclass
class _Fitting:
    config: Supervised
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
        rows = config.batch(self.step, self.on.seed)
        with self.on.watch.phase("update"):
            metrics = await asyncio.to_thread(config.learner.learn, rows)
        report = StepReport(
            step=self.step,
            model_version=self.on.lineage.version,
            reward=sum(sum(row.rewards) for row in rows) / len(rows),
            rollouts=len({row.rollout_id for row in rows}),
            failed=0,
            rollouts_per_second=0.0,
            spans=0,
            seconds=time.monotonic() - began,
            metrics=metrics,
            epoch=self.on.lineage.epoch,
            validation_reward=self.validated,
            tokens=sum(sum(weight > 0 for weight in row.ce) for row in rows),
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


def _digest(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows' tokens and weights."""
    found = hashlib.sha256()
    for row in rows:
        found.update(f"{row.rollout_id} {row.prompt} {row.response} {row.ce}\n".encode())
    return found.hexdigest()
