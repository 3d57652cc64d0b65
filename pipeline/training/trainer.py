"""The trainer: publishes tasks in groups, waits for their ends, learns, publishes the new policy."""

import asyncio
import itertools
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, Protocol

from tenacity import AsyncRetrying, before_sleep_log, retry_if_exception, stop_after_delay, wait_fixed

from millstream.consumers.adapter.triplets import ToTriplets, TripletMaker
from millstream.consumers.log.port import Log
from millstream.consumers.runner.hooks import Hook
from millstream.pipeline.blocking import run_blocking
from millstream.pipeline.models.server import ModelServer, UpdateFailed
from millstream.pipeline.models.vllm_process import VllmOptions
from millstream.pipeline.training.algorithm import Algorithm, FinishedRollout, Group
from millstream.pipeline.training.collector import Collector
from millstream.producers.control import publish_control, publish_resources
from millstream.producers.log.port import Producer
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import derived_id, new_id
from millstream.schemas.resources import LLM, Resources
from millstream.schemas.wire import status
from millstream.schemas.wire.records import Control, RolloutTask

logger = logging.getLogger(__name__)

UPDATE_S = 1800.0  # how long a step waits for a model server that is down; a large model takes minutes to load
UPDATE_AGAIN_S = 5.0

Task = Any  # what the agent is called with; JSON


class Strategy(Protocol):
    """How the roles run. Entered, it gives a log on which tasks are picked up and settled, and the model's server (None
    without an algorithm)."""

    def running(
        self,
        settings: Settings,
        *,
        agent: Any,
        model: Path | None,
        run_dir: Path,
        to_triplets: ToTriplets,
        hooks: Sequence[Hook | str],
        vllm: VllmOptions | None,
    ) -> AbstractAsyncContextManager[tuple[Log, ModelServer | None]]: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of training, for whoever watches. Rewards are means over the rollouts that succeeded."""

    step: int
    model_version: str  # that made the rollouts
    reward: float
    rollouts: int
    failed: int
    rollouts_per_second: float
    spans: int
    seconds: float
    metrics: Mapping[str, float]


@dataclass(slots=True)
class Summary:
    """What a run came to."""

    experiment_id: str
    steps: list[StepReport] = field(default_factory=list)
    validation_reward: float | None = None
    validation_failed: int = 0
    seconds: float = 0.0
    rollouts: int = 0
    spans: int = 0

    @property
    def first_reward(self) -> float | None:
        return self.steps[0].reward if self.steps else None

    @property
    def rollouts_per_second(self) -> float:
        return self.rollouts / self.seconds if self.seconds else 0.0


class Trainer:
    """Trains ``agent`` with ``algorithm``.

    ``agent`` is a callable or ``module:attribute``; a `Tracer` of it may be given as ``runner`` instead.
    ``strategy`` is "memory" (everything in this process) or "kafka": then runners, adapter, sink and proxy are
    processes of their own, unless an agent is given here. ``adapter`` replaces the function from traces to triplets
    where the adapter runs in this process, ``hooks`` (objects or ``module:attribute``) surround each attempt of an
    agent given here. Training ends after ``max_steps``, or when each
    of ``patience`` steps in a row has a mean reward of at least ``stop_reward`` and so has a validation then; if that
    falls short, it goes on. The policy is served by the demo engine or, as ``vllm`` says, by a vLLM of this process.
    """

    def __init__(
        self,
        *,
        algorithm: Algorithm | None = None,
        agent: Any = None,
        runner: Callable[..., Any] | None = None,
        strategy: str | Strategy = "memory",
        tasks: Sequence[Task] = (),
        val_tasks: Sequence[Task] = (),
        max_steps: int = 100,
        stop_reward: float | None = None,
        patience: int = 3,
        run: str = "run",
        run_dir: str | Path = "runs/default",
        adapter: ToTriplets | None = None,
        seed: int = 0,
        settings: Settings | None = None,
        on_step: Callable[[StepReport], None] = lambda report: None,
        hooks: Sequence[Hook | str] = (),
        vllm: VllmOptions | None = None,
    ) -> None:
        if runner is not None and agent is not None:
            raise ConfigError("agent and runner are two ways to name what runs: give one of them")
        agent = agent if runner is None else runner
        if hooks and agent is None:
            raise ConfigError("hooks run where the agent does: give the runners --hook module:attribute")
        self._hooks = hooks
        self._vllm = vllm
        self._algorithm = algorithm
        self._agent = agent
        self._strategy = strategy_of(strategy) if isinstance(strategy, str) else strategy
        self._tasks, self._val_tasks = tasks, val_tasks
        self._max_steps = max_steps
        self._stop_reward, self._patience = stop_reward, patience
        self._run = run
        self._run_dir = Path(run_dir)
        self._seed = seed
        self._settings = settings or load_settings()
        # A proxy_url that nobody has set says nothing about the machines that the runners are on.
        known = agent is None and "proxy_url" in self._settings.model_fields_set
        self._endpoints = self._settings.proxy_urls if known else ()
        self._adapter = adapter or TripletMaker(self._settings.triplets)
        self._on_step = on_step

    def fit(self, tasks: Sequence[Task] | None = None, val_tasks: Sequence[Task] | None = None) -> Summary:
        """Trains, then validates on ``val_tasks``. Raises `ConfigError` if there is nothing to learn from or with."""
        return run_blocking(self.train(tasks, val_tasks))

    def dev(self, tasks: Sequence[Task] | None = None) -> list[FinishedRollout]:
        """Runs the agent over the tasks, through everything, and learns nothing: for trying an agent out."""
        return run_blocking(self._dev(self._tasks if tasks is None else tasks))

    async def train(self, tasks: Sequence[Task] | None = None, val_tasks: Sequence[Task] | None = None) -> Summary:
        """As `fit`, for callers who have an event loop."""
        tasks = self._tasks if tasks is None else tasks
        val_tasks = self._val_tasks if val_tasks is None else val_tasks
        if self._algorithm is None:
            raise ConfigError("training needs an algorithm: Trainer(algorithm=…); `dev` runs an agent without one")
        if not tasks:
            raise ConfigError("training needs tasks: none were given")
        async with self._running() as (log, server):
            run = self._new_run(log, server)
            try:
                await run.start(self._seed)
                stop = self._stop_reward, self._patience
                validated = await run.learn(tasks, val_tasks, self._seed, self._max_steps, *stop)
                if val_tasks and not validated:
                    await run.validate(val_tasks)
            finally:
                await run.close()
            return run.summary

    async def _dev(self, tasks: Sequence[Task]) -> list[FinishedRollout]:
        async with self._running() as (log, server):
            run = self._new_run(log, server)
            try:
                await run.start(self._seed)
                return await run.evaluate(tasks, "test")
            finally:
                await run.close()

    def _new_run(self, log: Log, server: ModelServer | None) -> "_Run":
        return _Run(
            self._settings, log, self._run, self._algorithm, server, self._run_dir, self._on_step, self._endpoints
        )

    def _running(self) -> AbstractAsyncContextManager[tuple[Log, ModelServer | None]]:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        model = self._algorithm.model if self._algorithm is not None else None
        return self._strategy.running(
            self._settings,
            agent=self._agent,
            model=model,
            run_dir=self._run_dir,
            to_triplets=self._adapter,
            hooks=self._hooks,
            vllm=self._vllm,
        )


def strategy_of(name: str) -> Strategy:
    """ "memory" or "kafka". Raises `ConfigError` for any other name."""
    from millstream.pipeline.deployment import STRATEGIES  # it imports the roles, which import us

    if name not in STRATEGIES:
        raise ConfigError(f"strategy {name!r} is none of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]()


class _Run:
    """One experiment on one log."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        name: str,
        algorithm: Algorithm | None,
        server: ModelServer | None,
        run_dir: Path,
        on_step: Callable[[StepReport], None],
        endpoints: tuple[str, ...],
    ) -> None:
        self._endpoints = endpoints
        self._settings = settings
        self._topics = settings.topics
        self._name = name
        self._algorithm = algorithm
        self._server = server
        self._run_dir = run_dir
        self._on_step = on_step
        self._producer: Producer = log.producer()
        self._publisher = TaskPublisher(self._producer, self._topics)
        self._collector = Collector(log, self._topics, self._producer)
        self._started_ns = time.time_ns()
        self._started = time.monotonic()
        self._epoch = 0
        self._version = f"{name}.0.0"
        self._evaluations = itertools.count()
        self._resources_id = ""
        self.summary = Summary(new_id())

    async def start(self, seed: int) -> None:
        """Announces the experiment and the policy as it is before the first step."""
        await self._collector.start()
        await publish_control(
            self._producer,
            self._topics,
            Control(
                kind="experiment",
                name=self.summary.experiment_id,
                experiment_id=self.summary.experiment_id,
                body=json.dumps(
                    {
                        "run": self._name,
                        "seed": seed,
                        "algorithm": type(self._algorithm).__name__,
                        "settings": self._settings.model_dump(mode="json"),
                        "millstream": package_version("millstream"),
                        "python": sys.version.split()[0],
                    }
                ),
                created_at=self._started_ns,
            ),
        )
        await self._publish_policy(0)

    async def close(self) -> None:
        self.summary.seconds = time.monotonic() - self._started
        await self._collector.close()
        await asyncio.to_thread(self._producer.close)

    async def learn(
        self,
        tasks: Sequence[Task],
        val_tasks: Sequence[Task],
        seed: int,
        max_steps: int,
        stop_reward: float | None,
        patience: int,
    ) -> bool:
        """Whether it ended with a validation that was good enough."""
        assert self._algorithm is not None
        rewards: list[float] = []
        cursor = _shuffled(tasks, seed)
        for step in range(max_steps):
            began = time.monotonic()
            chosen = [next(cursor) for _ in range(self._algorithm.groups_per_step)]
            groups = await self._rollouts(chosen, self._algorithm.group_size, "train", f"train/{step}")
            metrics = await asyncio.to_thread(self._algorithm.update, groups)
            report = self._report(step, groups, metrics, time.monotonic() - began)
            await self._save(step + 1, seed)
            await self._publish_policy(step + 1)
            rewards.append(report.reward)
            recent = rewards[-patience:]
            if stop_reward is None or len(recent) < patience or min(recent) < stop_reward:
                continue
            if not val_tasks:
                return False
            if await self.validate(val_tasks) >= stop_reward:
                return True
            rewards.clear()  # it knows these tasks by heart, and has more to learn
        return False

    async def validate(self, tasks: Sequence[Task]) -> float:
        finished = await self.evaluate(tasks, "val")
        self.summary.validation_reward = mean_reward(finished)
        self.summary.validation_failed = _failed(finished)
        return self.summary.validation_reward

    async def evaluate(self, tasks: Sequence[Task], mode: str) -> list[FinishedRollout]:
        """Every task once, with the policy as it is."""
        groups = await self._rollouts(tasks, 1, mode, f"{mode}/{next(self._evaluations)}")
        finished = [member for group in groups for member in group.members]
        self._count(finished)
        return finished

    async def _rollouts(self, tasks: Sequence[Task], members: int, mode: str, purpose: str) -> list[Group]:
        """Publishes ``members`` rollouts of each task and waits for all of them. Ids are derived from the run, the
        purpose and the places, so publishing again would be recognised."""
        ids = [
            [derived_id(self._started_ns, self.summary.experiment_id, purpose, i, k) for k in range(members)]
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

    def _task(self, task: Task, rollout_id: str, group_id: str, members: int, mode: str) -> RolloutTask:
        return RolloutTask(
            rollout_id=rollout_id,
            group_id=group_id,
            group_size=members,
            input=json.dumps(task, ensure_ascii=False),
            mode=mode,
            resources_id=self._resources_id,
            max_attempts=self._settings.retry_max_attempts,
            max_lost_attempts=self._settings.retry_max_lost_attempts,
            timeout_s=self._settings.timeout_s,
            lease_s=self._settings.lease_s,
            experiment_id=self.summary.experiment_id,
            created_at=time.time_ns(),
        )

    def _report(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], seconds: float) -> StepReport:
        finished = [member for group in groups for member in group.members]
        self._count(finished)
        report = StepReport(
            step=step,
            model_version=self._version,
            reward=mean_reward(finished),
            rollouts=len(finished),
            failed=_failed(finished),
            rollouts_per_second=self.summary.rollouts / (time.monotonic() - self._started),
            spans=self.summary.spans,
            seconds=seconds,
            metrics=metrics,
        )
        self.summary.steps.append(report)
        self._on_step(report)
        return report

    def _count(self, finished: Sequence[FinishedRollout]) -> None:
        self.summary.rollouts += len(finished)
        self.summary.spans += sum(member.end.spans for member in finished)

    async def _publish_policy(self, step: int) -> None:
        """New weights first, then the resources that name them: who reads the announcement finds them served."""
        self._version = f"{self._name}.{self._epoch}.{step}"
        await self._update_server()
        self._resources_id = new_id()
        await publish_resources(
            self._producer,
            self._topics,
            Resources(
                resources_id=self._resources_id,
                experiment_id=self.summary.experiment_id,
                items={"policy": LLM(model="policy", model_version=self._version, endpoints=self._endpoints)},
            ),
        )

    async def _update_server(self) -> None:
        """A run of days waits for a server that is just being started again. Raises `UpdateFailed`."""
        if self._algorithm is None or self._server is None:
            return
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, UpdateFailed) and error.passing),
            wait=wait_fixed(UPDATE_AGAIN_S),
            stop=stop_after_delay(UPDATE_S),
            before_sleep=before_sleep_log(logger, logging.WARNING),
            reraise=True,
        ):
            with attempt:
                await self._server.update(self._algorithm.weights(), self._version)

    async def _save(self, step: int, seed: int) -> None:
        """The checkpoint comes before the announcement: what others build on can be gone back to."""
        from millstream.pipeline.training import checkpoint  # needs torch, as whatever learns does

        assert self._algorithm is not None
        await asyncio.to_thread(
            checkpoint.save,
            self._run_dir / "checkpoints",
            step,
            self._algorithm.state(),
            positions=self._collector.positions(),
            extra={
                "experiment_id": self.summary.experiment_id,
                "model_version": f"{self._name}.{self._epoch}.{step}",
                "started_ns": self._started_ns,
                "seed": seed,
                "tasks_drawn": step * self._algorithm.groups_per_step,
                "outstanding": sorted(self._collector.outstanding),
            },
        )


def mean_reward(finished: Sequence[FinishedRollout]) -> float:
    """Over the rollouts that succeeded; one that was given no reward counts as 0. 0 if none succeeded."""
    rewards = [m.end.reward or 0.0 for m in finished if m.end.status == status.SUCCEEDED]
    return statistics.fmean(rewards) if rewards else 0.0


def _failed(finished: Sequence[FinishedRollout]) -> int:
    return sum(member.end.status != status.SUCCEEDED for member in finished)


def _shuffled(tasks: Sequence[Task], seed: int) -> Iterator[Task]:
    """All tasks in random order, again and again; the same seed gives the same order."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    while True:
        yield from rng.sample(tasks, len(tasks))
