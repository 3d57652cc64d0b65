"""The trainer: the facade over a run and the deployment that it runs on."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from millstream.consumers.adapter.triplets import ToTriplets, TripletMaker
from millstream.consumers.runner.hooks import Hook
from millstream.pipeline.blocking import run_blocking
from millstream.pipeline.models.vllm_process import VllmOptions
from millstream.pipeline.training.algorithm import Algorithm, FinishedRollout
from millstream.pipeline.training.deployment import strategy_of
from millstream.pipeline.training.report import StepReport, Summary
from millstream.pipeline.training.run import Run, StopRule, Task
from millstream.pipeline.training.strategy import Setup, Strategy
from millstream.producers.task_input import task_input
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.folders import make_folder


class Trainer:
    """Trains ``agent`` with ``algorithm``.

    ``agent`` is a callable or ``module:attribute``; ``runner`` takes a `Tracer` of one instead. ``strategy`` is
    "memory" (everything in this process) or "kafka": then runners, adapter, sink and proxy are separate processes,
    unless an agent is given here. ``adapter`` replaces the function from traces to triplets where the adapter runs in
    this process. ``hooks`` (objects or ``module:attribute``) surround each attempt of an agent given here. Training
    ends after ``max_steps``, or when each of ``patience`` steps in a row, and then a validation, has a mean reward of
    at least ``stop_reward``. The demo engine serves the policy, or a vLLM of this process, as ``vllm`` says.

    Raises `ConfigError` for arguments that exclude each other.
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
            raise ConfigError("agent and runner both name what runs: give one of them")
        self._agent = agent if runner is None else runner
        if hooks and self._agent is None:
            raise ConfigError("hooks run where the agent does: give the runners --hook module:attribute")
        self._hooks = hooks
        self._vllm = vllm
        self._algorithm = algorithm
        self._strategy = strategy_of(strategy) if isinstance(strategy, str) else strategy
        self._tasks, self._val_tasks = tasks, val_tasks
        self._stop = StopRule(max_steps, stop_reward, patience)
        self._name = run
        self._run_dir = Path(run_dir)
        self._seed = seed
        self._settings = settings or load_settings()
        self._adapter = adapter or TripletMaker(self._settings.triplets)
        self._on_step = on_step

    def fit(self, tasks: Sequence[Task] | None = None, val_tasks: Sequence[Task] | None = None) -> Summary:
        """Trains, then validates on ``val_tasks``. Raises `ConfigError` without an algorithm or tasks."""
        return run_blocking(self.train(tasks, val_tasks))

    def dev(self, tasks: Sequence[Task] | None = None) -> list[FinishedRollout]:
        """Runs the agent on each task once, with every role but the algorithm."""
        return run_blocking(self._dev(self._tasks if tasks is None else tasks))

    async def train(self, tasks: Sequence[Task] | None = None, val_tasks: Sequence[Task] | None = None) -> Summary:
        """As `fit`, on the caller's event loop."""
        tasks = self._tasks if tasks is None else tasks
        val_tasks = self._val_tasks if val_tasks is None else val_tasks
        if self._algorithm is None:
            raise ConfigError("training needs an algorithm: Trainer(algorithm=…); `dev` runs an agent without one")
        if not tasks:
            raise ConfigError("training needs tasks: none were given")
        inputs, val_inputs = _inputs(tasks, "task"), _inputs(val_tasks, "val_task")
        async with self._started() as run:
            await run.learn(inputs, val_inputs, self._stop)
        return run.summary

    async def _dev(self, tasks: Sequence[Task]) -> list[FinishedRollout]:
        inputs = _inputs(tasks, "task")
        async with self._started() as run:
            return await run.evaluate(inputs, "test")

    @asynccontextmanager
    async def _started(self) -> AsyncIterator[Run]:
        make_folder(self._run_dir, "run_dir")
        # The default proxy_url says nothing about the machines that the runners are on.
        known = self._agent is None and "proxy_url" in self._settings.model_fields_set
        setup = Setup(
            settings=self._settings,
            agent=self._agent,
            to_triplets=self._adapter,
            run_dir=self._run_dir,
            model=self._algorithm.model if self._algorithm is not None else None,
            hooks=self._hooks,
            vllm=self._vllm,
        )
        async with self._strategy(setup) as (log, server):
            run = Run(
                self._settings,
                log,
                self._name,
                self._algorithm,
                server,
                self._run_dir,
                self._seed,
                self._on_step,
                endpoints=self._settings.proxy_urls if known else (),
            )
            try:
                await run.start()
                yield run
            finally:
                await run.close()


def _inputs(tasks: Sequence[Task], name: str) -> list[str]:
    """The tasks as JSON texts, checked before any role starts."""
    return [task_input(task, f"{name} {number}") for number, task in enumerate(tasks)]
