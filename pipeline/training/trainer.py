"""The trainer: the facade over a run and the deployment that it runs on."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from millstream.consumers.adapter.triplets import ToTriplets, TripletMaker
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.port import Log
from millstream.consumers.runner.agent import agent_name, load_agent, load_hook
from millstream.consumers.runner.hooks import Hook
from millstream.pipeline.models.vllm_process import VllmOptions, check_vllm
from millstream.pipeline.tracing.blocking import run_blocking
from millstream.pipeline.training import checkpoint
from millstream.pipeline.training.algorithm import Algorithm
from millstream.pipeline.training.checkpoint import Checkpoint
from millstream.pipeline.training.deployment import strategy_of
from millstream.pipeline.training.groups import FinishedRollout
from millstream.pipeline.training.report import StepReport, Summary
from millstream.pipeline.training.reporting.progress import shown
from millstream.pipeline.training.reporting.provenance import JOBS, SERVERS, provenance
from millstream.pipeline.training.reporting.record import algorithm_record
from millstream.pipeline.training.reporting.waiting import watch
from millstream.pipeline.training.run import CHECKPOINTS, Experiment, Run, StopRule, Task
from millstream.pipeline.training.strategy import Setup, Strategy
from millstream.producers.supervisor import supervisor
from millstream.producers.task_input import task_input
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.control import PromptTemplate
from millstream.schemas.errors import ConfigError
from millstream.schemas.folders import held_folder, make_folder

DEFAULT_STEPS: Final = 100


class Trainer:
    """Trains ``agent`` with ``algorithm``.

    ``agent`` is a callable or ``module:attribute``; ``runner`` takes a `Tracer` of one instead. ``strategy`` is
    "memory" (everything in this process) or "kafka": then runners, adapter, sink and proxy are separate processes,
    unless an agent is given here. ``adapter`` replaces the function from traces to triplets where the adapter runs in
    this process. ``hooks`` (objects or ``module:attribute``) surround each attempt of an agent given here. Training
    ends after ``max_steps`` (by default those of the algorithm, else 100), or when each of ``patience`` steps in a row,
    and then a validation, has a mean reward of at least ``stop_reward``. ``resume``: "auto" goes on from the last
    checkpoint in ``run_dir``, if there is one; "never" starts anew, and refuses a folder that has some; a checkpoint's
    folder, or its name such as "step-42", goes on from that one. The demo engine serves the policy, or a vLLM of this
    process, as ``vllm`` says. ``on_step`` is called after each step; without it a live table is shown, on a terminal
    and in a notebook. With ``deterministic`` the engine computes each answer alone, so that seeds repeat answers bit by
    bit. ``prompts``: templates that agents read as ``resources[NAME]``. ``config`` is the file that all this was read
    from, for the record of the experiment.

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
        max_steps: int | None = None,
        stop_reward: float | None = None,
        patience: int = 3,
        run: str = "run",
        run_dir: str | Path = "runs/default",
        resume: str | Path = "auto",
        adapter: ToTriplets | None = None,
        seed: int = 0,
        settings: Settings | None = None,
        on_step: Callable[[StepReport], object] | None = None,
        hooks: Sequence[Hook | str] = (),
        vllm: VllmOptions | None = None,
        deterministic: bool = False,
        prompts: Mapping[str, PromptTemplate] = MappingProxyType({}),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if deterministic and vllm is not None:
            raise ConfigError("deterministic is for the demo engine: drop it, or vllm")
        if runner is not None and agent is not None:
            raise ConfigError("agent and runner both name what runs: give one of them")
        self._agent = agent if runner is None else runner
        if hooks and self._agent is None:
            raise ConfigError("hooks run where the agent does: give the runners --hook module:attribute")
        self._hooks = hooks
        self._vllm = vllm
        self._deterministic = deterministic
        self._config = config
        self._prompts = prompts
        self._algorithm = algorithm
        self._strategy = strategy_of(strategy) if isinstance(strategy, str) else strategy
        self._tasks, self._val_tasks = tasks, val_tasks
        steps = getattr(algorithm, "steps", DEFAULT_STEPS) if max_steps is None else max_steps
        self._stop = StopRule(steps, stop_reward, patience)
        self._name = run
        self._run_dir = Path(run_dir)
        self._resume = resume
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
        """As `fit`, on the caller's event loop. One trainer at a time may use ``run_dir``."""
        experiment = self._experiment(tasks, val_tasks)
        assert self._algorithm is not None
        make_folder(self._run_dir, "run_dir")
        with (
            held_folder(self._run_dir, "run_dir"),
            shown(self._name, quiet=self._on_step is not None) as view,
        ):
            async with self._started(experiment, None if view is None else view.on_step) as run:
                await self._algorithm.run(run)
        return run.summary

    def check(self, tasks: Sequence[Task] | None = None, val_tasks: Sequence[Task] | None = None) -> dict[str, Any]:
        """The record of the experiment that `fit` would begin or go on with, without starting anything. Raises
        `ConfigError` for what would be refused then."""
        experiment = self._experiment(tasks, val_tasks)
        restored = self._restored(find=True)
        if restored is not None:
            experiment = experiment.restored(restored, self._run_dir)
        folder = str(Path.cwd())
        if self._vllm is not None:
            check_vllm(self._settings.vllm_python)
        if (refuse := getattr(self._algorithm, "check", None)) is not None:
            refuse(self._settings, len(experiment.tasks))
        if self._agent is not None:
            load_agent(self._agent, folder)
        for hook in self._hooks:
            load_hook(hook, folder)
        return self._record(experiment)

    def _experiment(self, tasks: Sequence[Task] | None, val_tasks: Sequence[Task] | None) -> Experiment:
        tasks = self._tasks if tasks is None else tasks
        val_tasks = self._val_tasks if val_tasks is None else val_tasks
        if self._algorithm is None:
            raise ConfigError("training needs an algorithm: Trainer(algorithm=…); `dev` runs an agent without one")
        if not hasattr(self._algorithm, "run"):
            kind = type(self._algorithm).__name__
            raise ConfigError(f"algorithm: {kind} has no method run; a learner needs a loop: PolicyGradient({kind}(…))")
        if not tasks and getattr(self._algorithm, "needs_tasks", True):
            raise ConfigError("training needs tasks: none were given")
        inputs, val_inputs = _inputs(tasks, "task"), _inputs(val_tasks, "val_task")
        return Experiment(self._name, self._seed, inputs, val_inputs, self._stop)

    def _record(self, experiment: Experiment) -> dict[str, Any]:
        """What the run is started with. Reads the whole model."""
        settings, model = self._settings, getattr(self._algorithm, "model", None)
        interpreters: dict[Path, Sequence[str]] = {}
        if self._vllm is not None:
            interpreters[settings.vllm_python] = SERVERS
        if (python := getattr(self._algorithm, "python_setting", None)) is not None:
            interpreters[getattr(settings, python)] = JOBS
        described = {} if self._algorithm is None else algorithm_record(self._algorithm)
        found = provenance(model, interpreters)
        return {
            **described,
            "config": None if self._config is None else dict(self._config),
            "deterministic": self._deterministic,
            "agent": self._agent if isinstance(self._agent, str) else agent_name(self._agent) if self._agent else None,
            "data": getattr(self._algorithm, "data", None),
            **(
                {"prompts": {name: asdict(template) for name, template in self._prompts.items()}}
                if self._prompts
                else {}
            ),
            **experiment.digests,
            **found,
            "millstream": found["packages"]["millstream"],
            "settings": settings.model_dump(mode="json"),
        }

    async def _dev(self, tasks: Sequence[Task]) -> list[FinishedRollout]:
        inputs = _inputs(tasks, "task")
        async with self._started(Experiment(self._name, self._seed), goes_on=False) as run:
            await run.publish_weights(None, 0)
            return await run.evaluate(inputs, "test")

    @asynccontextmanager
    async def _started(
        self, experiment: Experiment, view: Callable[[StepReport], object] | None = None, *, goes_on: bool = True
    ) -> AsyncIterator[Run]:
        """``goes_on``: from a checkpoint, if there is one."""
        make_folder(self._run_dir, "run_dir")
        restored = self._restored() if goes_on else None
        if restored is not None:
            experiment = experiment.restored(restored, self._run_dir)
        # The default proxy_url says nothing about the machines that the runners are on.
        known = self._agent is None and "proxy_url" in self._settings.model_fields_set
        reached = [self._settings]
        setup = Setup(
            settings=self._settings,
            agent=self._agent,
            to_triplets=self._adapter,
            run_dir=self._run_dir,
            model=self._algorithm.model if self._algorithm is not None else None,
            hooks=self._hooks,
            vllm=self._vllm,
            deterministic=self._deterministic,
            rollouts=not goes_on or bool(experiment.tasks or experiment.val_tasks),
            on_proxy=reached.append,
        )
        record = await asyncio.to_thread(self._record, experiment)
        async with self._strategy(setup) as (log, server):
            run = Run(
                reached[-1],
                log,
                experiment,
                server=server,
                run_dir=self._run_dir,
                on_step=self._on_step or view or (lambda report: None),
                endpoints=self._settings.proxy_urls if known else (),
                prompts=self._prompts,
                restored=restored,
            )
            try:
                await run.start(record)
                async with self._watched(log, run, served=server is not None):
                    yield run
            finally:
                await run.close()

    @asynccontextmanager
    async def _watched(self, log: Log, run: Run, *, served: bool) -> AsyncIterator[None]:
        """Names roles that are missing, where they are processes of their own."""
        if self._agent is not None or not isinstance(log, KafkaLog):
            yield
            return
        roles = ["runner", *(["proxy"] if served else []), "adapter"]
        watching = supervisor().loop("missing roles", watch(log, self._settings.topics, lambda: run.outstanding, roles))
        try:
            yield
        finally:
            await watching.close()

    def _restored(self, *, find: bool = False) -> Checkpoint | None:
        """``find``: leaves the folder as it is."""
        folder = self._run_dir / CHECKPOINTS
        return (checkpoint.find if find else checkpoint.restore)(folder, self._resume)


def _inputs(tasks: Sequence[Task], name: str) -> list[str]:
    """The tasks as JSON texts, checked before any role starts."""
    return [task_input(task, f"{name} {number}") for number, task in enumerate(tasks)]
