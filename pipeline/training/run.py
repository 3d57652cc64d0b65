"""One training run on one log: publishes tasks in groups, collects their ends, learns, publishes the new policy."""

import asyncio
import itertools
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from tenacity import AsyncRetrying, before_sleep_log, retry_if_exception, stop_after_delay, wait_fixed

from millstream.consumers.log.port import Log
from millstream.pipeline.models.server import ModelServer, UpdateFailed
from millstream.pipeline.training.algorithm import Algorithm, FinishedRollout, Group
from millstream.pipeline.training.collector import Collector
from millstream.pipeline.training.report import StepReport, Summary, failures, mean_reward
from millstream.producers.control import publish_control, publish_resources
from millstream.producers.log.port import Producer
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.config.settings import Settings
from millstream.schemas.control import LLM, Resources
from millstream.schemas.ids import derived_id, id_time_ms, new_id
from millstream.schemas.spans.text import json_text
from millstream.schemas.wire.records import Control, RolloutTask

logger = logging.getLogger(__name__)

Task = Any  # the agent's argument; see `task_input`


@dataclass(frozen=True, slots=True)
class UpdatePolicy:
    """How long a step waits for a model server that is down."""

    retry_s: float = 5.0
    give_up_s: float = 1800.0  # a large model takes minutes to load


@dataclass(frozen=True, slots=True)
class StopRule:
    """When training ends: after ``max_steps``, or once ``patience`` steps in a row have earned ``reward``."""

    max_steps: int
    reward: float | None = None
    patience: int = 3

    def reached(self, rewards: Sequence[float]) -> bool:
        """Whether the last of these mean rewards, one a step, are good enough."""
        recent = rewards[-self.patience :]
        return len(recent) == self.patience and all(map(self.good_enough, recent))

    def good_enough(self, reward: float) -> bool:
        return self.reward is not None and reward >= self.reward


class Run:
    """One experiment. ``endpoints`` are the proxies that its rollouts should use; empty: those the runners know."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        name: str,
        algorithm: Algorithm | None,
        server: ModelServer | None,
        run_dir: Path,
        seed: int,
        on_step: Callable[[StepReport], None],
        endpoints: tuple[str, ...] = (),
        update: UpdatePolicy = UpdatePolicy(),
    ) -> None:
        self._settings = settings
        self._topics = settings.topics
        self._name = name
        self._algorithm = algorithm
        self._server = server
        self._run_dir = run_dir
        self._seed = seed
        self._on_step = on_step
        self._endpoints = endpoints
        self._update_policy = update
        self._producer: Producer = log.producer()
        self._publisher = TaskPublisher(self._producer, settings)
        self._collector = Collector(log, self._topics, self._producer)
        self._started_ns = time.time_ns()
        self._started = time.monotonic()
        self._model_version = ""
        self._resources_id = ""
        self._evaluations = itertools.count()
        self.summary = Summary(new_id())

    async def start(self) -> None:
        """Announces the experiment and the policy before its first step."""
        await self._collector.start()
        body = {
            "run": self._name,
            "seed": self._seed,
            "algorithm": type(self._algorithm).__name__,
            "settings": self._settings.model_dump(mode="json"),
            "millstream": package_version("millstream"),
            "python": sys.version.split()[0],
        }
        experiment = Control(
            kind="experiment",
            name=self.summary.experiment_id,
            experiment_id=self.summary.experiment_id,
            body=json_text(body),
            created_at=self._started_ns,
        )
        await publish_control(self._producer, self._topics, experiment)
        await self._publish_policy(0)

    async def close(self) -> None:
        self.summary.seconds = time.monotonic() - self._started
        await self._collector.close()
        await asyncio.to_thread(self._producer.close)

    async def learn(self, tasks: Sequence[str], val_tasks: Sequence[str], stop: StopRule) -> None:
        """Trains until ``stop``; then the summary has the validation of the policy, if there are ``val_tasks``.
        Tasks are JSON texts.

        A validation that falls short of ``stop.reward`` starts the count of good steps again.
        """
        assert self._algorithm is not None
        rewards: list[float] = []
        order = _shuffled(tasks, self._seed)
        for step in range(stop.max_steps):
            rewards.append(await self._step(step, list(itertools.islice(order, self._algorithm.groups_per_step))))
            if not stop.reached(rewards):
                continue
            if not val_tasks or stop.good_enough(await self._validate(val_tasks)):
                return
            rewards.clear()
        if val_tasks:
            await self._validate(val_tasks)

    async def evaluate(self, tasks: Sequence[str], mode: str) -> list[FinishedRollout]:
        """Runs each task once with the current policy, and learns nothing."""
        groups = await self._rollouts(tasks, 1, mode, f"{mode}/{next(self._evaluations)}")
        finished = [member for group in groups for member in group.members]
        self._count(finished)
        return finished

    async def _step(self, step: int, tasks: Sequence[str]) -> float:
        """One step of training; returns its mean reward."""
        assert self._algorithm is not None
        began = time.monotonic()
        groups = await self._rollouts(tasks, self._algorithm.group_size, "train", f"train/{step}")
        metrics = await asyncio.to_thread(self._algorithm.update, groups)
        reward = self._report(step, groups, metrics, time.monotonic() - began)
        # Checkpoint first: a version that is announced can be restored.
        await self._save(step + 1)
        await self._publish_policy(step + 1)
        return reward

    async def _validate(self, tasks: Sequence[str]) -> float:
        finished = await self.evaluate(tasks, "val")
        self.summary.validation_reward = mean_reward(finished)
        self.summary.validation_failed = failures(finished)
        return self.summary.validation_reward

    async def _rollouts(self, tasks: Sequence[str], members: int, mode: str, purpose: str) -> list[Group]:
        """Publishes ``members`` rollouts of each task and waits until all have ended. Ids are derived from the run, its
        current policy, the purpose and the position, so a task that is published twice has the same id."""
        announced_ns = id_time_ms(self._resources_id) * 1_000_000
        ids = [
            [derived_id(announced_ns, self.summary.experiment_id, purpose, i, k) for k in range(members)]
            for i in range(len(tasks))
        ]
        flat = [rollout_id for group in ids for rollout_id in group]
        self._collector.expect(flat)
        await self._publisher.publish(
            [
                self._task(task, rollout_id, group[0], members, mode)
                for task, group in zip(tasks, ids, strict=True)
                for rollout_id in group
            ]
        )
        finished = iter(await self._collector.collect(flat))
        return [Group(group[0], tuple(next(finished) for _ in group)) for group in ids]

    def _task(self, task: str, rollout_id: str, group_id: str, members: int, mode: str) -> RolloutTask:
        return RolloutTask(
            rollout_id=rollout_id,
            group_id=group_id,
            group_size=members,
            input=task,
            mode=mode,
            resources_id=self._resources_id,
            max_attempts=self._settings.retry_max_attempts,
            max_lost_attempts=self._settings.retry_max_lost_attempts,
            timeout_s=self._settings.timeout_s,
            lease_s=self._settings.lease_s,
            experiment_id=self.summary.experiment_id,
            created_at=time.time_ns(),
        )

    def _report(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], seconds: float) -> float:
        finished = [member for group in groups for member in group.members]
        self._count(finished)
        report = StepReport(
            step=step,
            model_version=self._model_version,
            reward=mean_reward(finished),
            rollouts=len(finished),
            failed=failures(finished),
            rollouts_per_second=self.summary.rollouts / (time.monotonic() - self._started),
            spans=self.summary.spans,
            seconds=seconds,
            metrics=metrics,
        )
        self.summary.steps.append(report)
        self._on_step(report)
        return report.reward

    def _count(self, finished: Sequence[FinishedRollout]) -> None:
        self.summary.rollouts += len(finished)
        self.summary.spans += sum(member.end.spans for member in finished)

    async def _publish_policy(self, step: int) -> None:
        """Updates the model server, then announces the version: a version that is announced is served."""
        self._model_version = self._version(step)
        await self._update_server()
        self._resources_id = new_id()
        policy = LLM(model="policy", model_version=self._model_version, endpoints=self._endpoints)
        resources = Resources(
            resources_id=self._resources_id, experiment_id=self.summary.experiment_id, items={"policy": policy}
        )
        await publish_resources(self._producer, self._topics, resources)

    async def _update_server(self) -> None:
        """Waits for a server that is restarting. Raises `UpdateFailed`."""
        if self._algorithm is None or self._server is None:
            return
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, UpdateFailed) and error.passing),
            wait=wait_fixed(self._update_policy.retry_s),
            stop=stop_after_delay(self._update_policy.give_up_s),
            before_sleep=before_sleep_log(logger, logging.WARNING),
            reraise=True,
        ):
            with attempt:
                await self._server.update(self._algorithm.weights(), self._model_version)

    async def _save(self, step: int) -> None:
        from millstream.pipeline.training import checkpoint  # needs torch

        assert self._algorithm is not None
        await asyncio.to_thread(
            checkpoint.save,
            self._run_dir / "checkpoints",
            step,
            self._algorithm.state(),
            positions=self._collector.positions(),
            extra={
                "experiment_id": self.summary.experiment_id,
                "model_version": self._version(step),
                "started_ns": self._started_ns,
                "seed": self._seed,
                "tasks_drawn": step * self._algorithm.groups_per_step,
                "outstanding": sorted(self._collector.outstanding),
            },
        )

    def _version(self, step: int) -> str:
        return f"{self._name}.0.{step}"  # run.epoch.step; every run has one epoch


def _shuffled(tasks: Sequence[str], seed: int) -> Iterator[str]:
    """All tasks in random order, repeatedly; the same seed gives the same order."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    while True:
        yield from rng.sample(tasks, len(tasks))
