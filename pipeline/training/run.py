"""A training run: one experiment's handle on the log. An algorithm asks it for rollouts, and gives it new weights,
checkpoints and reports."""

import asyncio
import dataclasses
import hashlib
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tenacity import AsyncRetrying, before_sleep_log, retry_if_exception, stop_after_delay, wait_fixed

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.port import Log
from millstream.pipeline.models.server import ModelServer, UpdateFailed
from millstream.pipeline.training import checkpoint
from millstream.pipeline.training.checkpoint import Checkpoint
from millstream.pipeline.training.collector import Collector
from millstream.pipeline.training.groups import FinishedRollout, Group, Lineage
from millstream.pipeline.training.report import StepReport, Summary, failures, mean_reward
from millstream.pipeline.training.reporting.record import RECORD, continued
from millstream.pipeline.training.reporting.steps import step_record
from millstream.pipeline.training.reporting.stopwatch import Stopwatch
from millstream.producers.control import cancel_record, publish_control
from millstream.producers.files import write_atomically
from millstream.producers.log.port import Producer
from millstream.producers.tasks import TaskPublisher
from millstream.producers.training import publish_step
from millstream.schemas.config.settings import Settings
from millstream.schemas.control import LLM, ControlBody, PromptTemplate, Resource, Resources
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import derived_id, id_time_ms, new_id, rank
from millstream.schemas.spans.text import json_text
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import Control, RolloutTask, TrainingStep

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


@dataclass(frozen=True)
class Experiment:
    """What a run is, from its start to its end, however often its trainer starts again. Tasks are JSON texts."""

    name: str  # first part of every model version
    seed: int = 0
    tasks: Sequence[str] = ()
    val_tasks: Sequence[str] = ()
    stop: StopRule = StopRule(100)
    experiment_id: str = dataclasses.field(default_factory=new_id)
    started_ns: int = dataclasses.field(default_factory=time.time_ns)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tasks."""
        return _digest([*self.tasks, "", *self.val_tasks])

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each kind of tasks."""
        return {"tasks": _digest(self.tasks), "val_tasks": _digest(self.val_tasks)}

    def restored(self, found: Checkpoint, where: Path) -> "Experiment":
        """This experiment as the one of a checkpoint. Raises `ConfigError` if they differ."""
        for name, saved, ours in (
            ("run", found.extra.get("name"), self.name),
            ("seed", found.extra.get("seed"), self.seed),
            ("tasks", found.extra.get("tasks"), self.digest),
        ):
            if saved != ours:
                raise ConfigError(
                    f"{where} holds checkpoints of a run with other {name} ({saved}, not {ours}): give the new run "
                    "another run_dir, or go on with what that one had"
                )
        return dataclasses.replace(
            self, experiment_id=found.extra["experiment_id"], started_ns=found.extra["started_ns"]
        )


class Run:
    """One experiment. ``server`` serves the policy; None if other processes do, or no policy is trained. ``endpoints``
    are the proxies that its rollouts should use; empty: those the runners know. ``prompts``: the templates that agents
    read, a part of each version that is published. ``restored``: the checkpoint that the run goes on from."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        experiment: Experiment,
        *,
        server: ModelServer | None = None,
        run_dir: Path = Path(),
        on_step: Callable[[StepReport], object] = lambda report: None,
        endpoints: tuple[str, ...] = (),
        prompts: Mapping[str, PromptTemplate] = MappingProxyType({}),
        restored: Checkpoint | None = None,
        update: UpdatePolicy = UpdatePolicy(),
    ) -> None:
        self.experiment = experiment
        self.restored = restored
        self.lineage = Lineage(experiment.name)
        self.summary = Summary(experiment.experiment_id)
        self.continues = False  # what the checkpoint's trainer had asked for still runs, or has ended
        self.settings = settings
        self._topics = settings.topics
        self._log = log
        self._server = server
        self.run_dir = run_dir
        self._on_step = on_step
        self._endpoints = endpoints
        self.prompts = dict(prompts)
        self._update_policy = update
        self._producer: Producer = log.producer()
        self._publisher = TaskPublisher(self._producer, settings)
        self._collector = Collector(log, self._topics, self._producer)
        self._started = time.monotonic()
        self._resources_id = ""
        self._next_resources_id = ""  # in the last checkpoint: of the version that it is the checkpoint of
        self._saved_resources_id = ""  # of the last checkpoint
        self._durable = -1  # its step
        self._saving: asyncio.Task[None] | None = None
        self._evaluations = 0
        self._restored_from = ""  # for the record of the next step
        self._step: TrainingStep | None = None  # the last one
        self.watch = Stopwatch()

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, settings: Settings, experiment: Experiment, *, positions: Mapping[int, int] | None = None
    ) -> "AsyncIterator[Run]":
        """A handle on a run of another process, over Kafka: for rollouts with resources that it has published.
        ``positions``: of a handle before, to find what its rollouts have ended with."""
        run = cls(settings, KafkaLog(settings), experiment)
        await run._collector.start(positions, experiment.experiment_id)
        try:
            yield run
        finally:
            await run.close()

    @property
    def seed(self) -> int:
        return self.experiment.seed

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between two trainers."""
        return time.monotonic() - self._started

    @property
    def log(self) -> Log:
        return self._log

    @property
    def resources_id(self) -> str:
        """The version of the resources that new rollouts use."""
        return self._resources_id

    @property
    def outstanding(self) -> frozenset[str]:
        """The rollouts that were asked for and have not ended."""
        return self._collector.outstanding

    async def start(self, record: Mapping[str, Any]) -> None:
        """Announces the experiment, or goes on where its checkpoint was written. ``record``: what it is started with
        (`reporting.record`); the run's folder keeps it, too."""
        if self.restored is None:
            (self.run_dir / NOTE).unlink(missing_ok=True)  # of a run whose checkpoints are gone
            await self._collector.start()
        else:
            self.continues = await self._collector.start(self.restored.positions, self.experiment.experiment_id)
            saved = self.restored.extra
            self.lineage = Lineage.from_json(saved["lineage"])
            announced, abandoned = self._noted()
            if announced is not None and (announced.epoch, announced.step) > (self.lineage.epoch, self.restored.step):
                self.lineage = announced
                self.lineage.restart(self.restored.step)
            elif self.restored.behind:
                self.lineage.restart(self.restored.step)
            else:
                self._durable = self.restored.step
                self._next_resources_id = "" if abandoned == saved["resources_id"] else saved["resources_id"]
            self.continues = self.continues and abandoned != saved["resources_id"]
            self._restored_from = str(self.restored.path)
            if saved["step"] is not None:  # its trainer may have been killed before it was published
                step = codec.decode_as(TrainingStep, bytes.fromhex(saved["step"]))
                await publish_step(self._producer, self._topics, step)
            self._saved_resources_id, self._evaluations = saved["resources_id"], saved["evaluations"]
            self.summary = Summary.of(saved["summary"])
            self._started -= self.summary.seconds
        log = "kafka" if isinstance(self._log, KafkaLog) else "memory"
        await self._announce({"run": self.experiment.name, "seed": self.seed, "log": log, **record})

    async def _announce(self, record: dict[str, Any]) -> None:
        path = self.run_dir / RECORD
        if self.restored is not None and (before := read_record(path, self.experiment.experiment_id)) is not None:
            now = {"at": time.time_ns(), "epoch": self.lineage.epoch, "step": self.restored.step}
            record = continued(before, record, now)
        text = json_text(record)
        kept = json_text({"experiment_id": self.experiment.experiment_id, **record})
        await asyncio.to_thread(write_atomically, path, kept.encode())
        experiment = Control(
            kind="experiment",
            name=self.experiment.experiment_id,
            experiment_id=self.experiment.experiment_id,
            body=text,
            # The store keeps the last of a name by this time. A record with one more change replaces the one before.
            created_at=self.experiment.started_ns + len(record.get("changes", ())),
        )
        await publish_control(self._producer, self._topics, experiment)

    async def close(self) -> None:
        self.summary.seconds = self.seconds
        if self._saving is not None:
            await asyncio.wait([self._saving])
        await self._collector.close()
        await asyncio.to_thread(self._producer.close)

    # Rollouts

    async def group(
        self,
        task: str,
        size: int,
        key: str,
        *,
        mode: str = "train",
        resources_id: str = "",
        published: bool = False,
        on_published: Callable[[], object] = lambda: None,
    ) -> Group:
        """Runs one task ``size`` times, and returns when all have ended. Their ids are derived from the experiment, the
        resources and ``key``, so rollouts that are asked for a second time are recognised by the pipeline, and end
        once; their seeds from the run's seed and ``key``. They are held until `release`, or `give_up`.

        ``resources_id``: the version that they were asked for with before; ``published``: they surely were, so they
        need not be again; ``on_published`` is called when they surely are.
        """
        resources_id = resources_id or self._resources_id
        rollouts = self._rollouts(task, size, key, mode, resources_id)
        members = await self._finished(rollouts, published, on_published)
        return Group(rollouts[0].group_id, tuple(members))

    async def _finished(
        self,
        rollouts: Sequence[RolloutTask],
        published: bool = False,
        on_published: Callable[[], object] = lambda: None,
    ) -> list[FinishedRollout]:
        """Publishes the rollouts unless they have been, and returns when all have ended, in their order."""
        ids = [rollout.rollout_id for rollout in rollouts]
        self._collector.expect(ids)  # before one of them can end
        if not published:
            await self._publisher.publish(rollouts)
            on_published()
        return await self._collector.collect(ids)

    def positions(self) -> dict[int, int]:
        """The next offset of triplets to read by partition, if the rollouts that are held were to be read again."""
        return self._collector.positions()

    def release(self, groups: Iterable[Group]) -> None:
        """The groups are done with: a checkpoint no longer has to find them."""
        self.release_each(member for group in groups for member in group.members)

    def release_each(self, finished: Iterable[FinishedRollout]) -> None:
        """As `release`."""
        self._collector.release(member.end.rollout_id for member in finished)

    async def give_up(self, size: int, key: str, resources_id: str) -> None:
        """Cancels what is still running of a group, and forgets it."""
        ids = self._ids(size, key, resources_id)
        running = self._collector.outstanding.intersection(ids)
        self._collector.release(ids)
        if running:
            await publish_control(self._producer, self._topics, cancel_record("group", ids[0]))

    async def evaluate(self, tasks: Sequence[str], mode: str = "val") -> list[FinishedRollout]:
        """Runs each task once with the current resources; nothing is learnt from it."""
        key = f"{mode}/{self._evaluations}"
        self._evaluations += 1
        finished = await self.each(tasks, key, mode=mode)
        self.release_each(finished)
        self.count(finished)
        return finished

    async def each(
        self,
        tasks: Sequence[str],
        key: str,
        *,
        mode: str = "train",
        resources_id: str = "",
        published: bool = False,
        on_published: Callable[[], object] = lambda: None,
    ) -> list[FinishedRollout]:
        """Runs each task once, and returns in their order when all have ended. The rest is as for `group`."""
        resources_id = resources_id or self._resources_id
        rollouts = [
            rollout
            for number, task in enumerate(tasks)
            for rollout in self._rollouts(task, 1, f"{key}/{number}", mode, resources_id)
        ]
        return await self._finished(rollouts, published, on_published)

    async def validate(self) -> float:
        """The mean reward of the validation tasks, which the summary has then, too."""
        finished = await self.evaluate(self.experiment.val_tasks)
        self.summary.validation_failed = failures(finished)
        self.summary.validation_reward = mean_reward(finished)
        return self.summary.validation_reward

    def count(self, finished: Sequence[FinishedRollout]) -> None:
        """Adds rollouts to the run's totals."""
        self.summary.rollouts += len(finished)
        self.summary.spans += sum(member.end.spans for member in finished)

    def _ids(self, size: int, key: str, resources_id: str) -> list[str]:
        asked_ns = id_time_ms(resources_id) * 1_000_000
        return [derived_id(asked_ns, self.experiment.experiment_id, key, k) for k in range(size)]

    def _rollouts(self, task: str, size: int, key: str, mode: str, resources_id: str) -> list[RolloutTask]:
        ids = self._ids(size, key, resources_id)
        return [
            RolloutTask(
                rollout_id=rollout_id,
                group_id=ids[0],
                group_size=size,
                input=task,
                mode=mode,
                seed=rank(str(self.seed), key, str(k)) >> 1,
                resources_id=resources_id,
                max_attempts=self.settings.retry_max_attempts,
                max_lost_attempts=self.settings.retry_max_lost_attempts,
                timeout_s=self.settings.timeout_s,
                lease_s=self.settings.lease_s,
                experiment_id=self.experiment.experiment_id,
                created_at=time.time_ns(),
            )
            for k, rollout_id in enumerate(ids)
        ]

    # What is learnt

    async def publish(self, items: Mapping[str, Resource]) -> Resources:
        """Announces resources, such as prompts. New rollouts use them."""
        resources_id, self._next_resources_id = self._next_resources_id or new_id(), ""
        resources = await self.offer(resources_id, items)
        self._resources_id = resources_id
        return resources

    async def offer(self, resources_id: str, items: Mapping[str, Resource]) -> Resources:
        """Announces a version for rollouts that ask for it by its id, a UUIDv7; a second time is the same version."""
        experiment_id, items = self.experiment.experiment_id, {**self.prompts, **items}
        resources = Resources(resources_id=resources_id, experiment_id=experiment_id, items=items)
        await self.announce(resources)
        return resources

    async def announce(self, body: ControlBody) -> None:
        """Writes a record to the control topic, and so into the store."""
        await publish_control(self._producer, self._topics, body.to_control())

    async def publish_weights(self, weights: "Mapping[str, Any] | None", step: int) -> str:
        """Has the weights after ``step`` updates served, then announces their version, which it returns: a version that
        is announced is served. Waits for a server that is restarting. Raises `UpdateFailed`."""
        with self.watch.phase("publish"):
            return await self._publish_weights(weights, step)

    async def _publish_weights(self, weights: "Mapping[str, Any] | None", step: int) -> str:
        self.lineage.step = step
        version = self.lineage.version
        if weights is not None and step > self._durable:
            await asyncio.to_thread(self._note, None)
        if self._server is not None and weights is not None:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(lambda error: isinstance(error, UpdateFailed) and error.passing),
                wait=wait_fixed(self._update_policy.retry_s),
                stop=stop_after_delay(self._update_policy.give_up_s),
                before_sleep=before_sleep_log(logger, logging.WARNING),
                reraise=True,
            ):
                with attempt:
                    await self._server.update(weights, version)
        await self.publish({"policy": LLM(model="policy", model_version=version, endpoints=self._endpoints)})
        return version

    def add(self, report: StepReport, trained: Sequence[str] = ()) -> None:
        """Ends a step: its time, from the end of the one before, is divided among the phases. ``trained``: ids of the
        rollouts that were trained on, for the ledger. Call it before `checkpoint`, and `tell` after it."""
        lap = self.watch.lap()
        phases = {str(phase): seconds for phase, seconds in lap.phases.items()}
        report = dataclasses.replace(report, phases=phases, experiment_id=self.experiment.experiment_id)
        self._step = step_record(
            report,
            lap,
            experiment_id=self.experiment.experiment_id,
            run=self.experiment.name,
            model_version=dataclasses.replace(self.lineage, step=report.step + 1).version,
            trained=trained,
            restored_from=self._restored_from,
        )
        self._restored_from = ""
        self.summary.steps.append(report)

    def all_expected(self) -> None:
        """Whatever the run's predecessor had asked for has been asked for again, or will not be."""
        self._collector.all_expected()

    async def tell(self) -> None:
        """Publishes the record of the last step, and shows the step."""
        assert self._step is not None
        await publish_step(self._producer, self._topics, self._step)
        self._on_step(self.summary.steps[-1])

    async def report(self, report: StepReport, trained: Sequence[str] = ()) -> None:
        """`add` and `tell`, for an algorithm that writes no checkpoints."""
        self.add(report, trained)
        await self.tell()

    # Going on

    async def checkpoint(
        self, step: int, state: Mapping[str, Any], loop: Mapping[str, Any], *, keep: int = 3, wait: bool = True
    ) -> None:
        """Writes a checkpoint of the policy after ``step`` updates; call it before `publish_weights`. ``state``: see
        `Learner.state`; ``loop``: what else the algorithm needs, as JSON. A run that goes on from here reads the
        rollouts that are held now again. Without ``wait`` it is written from a copy while training goes on.

        Raises what went wrong with the last one."""
        if self._saving is not None:
            with self.watch.phase("save"):
                await self._saving
        self._next_resources_id = self._saved_resources_id = new_id()
        self.summary.seconds = self.seconds
        lineage = dataclasses.replace(self.lineage, step=step)
        extra = {
            "experiment_id": self.experiment.experiment_id,
            "started_ns": self.experiment.started_ns,
            "name": self.experiment.name,
            "seed": self.seed,
            "tasks": self.experiment.digest,
            "model_version": lineage.version,
            "lineage": lineage.to_json(),
            "resources_id": self._next_resources_id,
            "evaluations": self._evaluations,
            "step": None if self._step is None else codec.encode(self._step).hex(),
            "outstanding": sorted(self._collector.outstanding),
            "summary": dataclasses.asdict(self.summary),
            "loop": dict(loop),
        }
        positions = self._collector.positions()
        kept = state if wait else checkpoint.copied(state)

        async def save() -> None:
            folder = self.run_dir / CHECKPOINTS
            await asyncio.to_thread(checkpoint.save, folder, step, kept, positions, extra, keep)
            self._durable = step

        self._saving = asyncio.create_task(save())
        if wait:
            with self.watch.phase("save"):
                await self._saving

    def note_abandoned(self) -> None:
        """The rollouts that the run has asked for are being cancelled: a run that goes on asks for others."""
        self._note(self._saved_resources_id)

    def _note(self, abandoned: str | None) -> None:
        """Writes down what the last checkpoint can't say: a version that may be served although there is no checkpoint
        of it, and that open rollouts are cancelled (by the resources version in that checkpoint)."""
        note = {"lineage": self.lineage.to_json(), "abandoned": abandoned}
        write_atomically(self.run_dir / NOTE, json_text(note).encode())

    def _noted(self) -> tuple[Lineage | None, str | None]:
        try:
            note = json.loads((self.run_dir / NOTE).read_text("utf-8"))
        except FileNotFoundError:
            return None, None
        found = Lineage.from_json(note["lineage"])
        return (found, note["abandoned"]) if found.run == self.experiment.name else (None, None)

    async def export(self, weights: Mapping[str, Any], model: Path, name: str) -> None:
        """Writes a Hugging Face folder into the run's: ``model`` with these weights."""
        await asyncio.to_thread(checkpoint.export, weights, model, self.run_dir / name)

    async def keep(self, name: str, target: str) -> None:
        """Gives a folder that was exported another name, if there is one."""
        if (self.run_dir / name).exists():
            await asyncio.to_thread(checkpoint.move, self.run_dir / name, self.run_dir / target)

    async def roll_back(self, reason: str, gradual: bool = False) -> Checkpoint:
        """Goes back to the last checkpoint, or to the oldest that was kept, in a new epoch. The caller gives up its
        groups. Raises `CheckpointDamaged`."""
        if self._saving is not None:
            await self._saving
        found = await asyncio.to_thread(checkpoint.go_back, self.run_dir / CHECKPOINTS, gradual)
        self.lineage.restart(found.step)
        self._next_resources_id, self._durable = "", -1
        self._restored_from = f"{found.path}: {reason}"
        self.summary.steps = [step for step in self.summary.steps if step.step < found.step]
        return found


CHECKPOINTS, NOTE = "checkpoints", "note.json"  # within the run's folder


def read_record(path: Path, experiment_id: str = "") -> dict[str, Any] | None:
    """What a run's folder says about its experiment, without the id. None if it says nothing (about this one)."""
    try:
        found = json.loads(path.read_text("utf-8"))
        known = found.pop("experiment_id")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return found if experiment_id in ("", known) else None


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def shuffled(tasks: Sequence[str], seed: int) -> Iterator[str]:
    """All tasks in random order, repeatedly; the same seed gives the same order."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    while True:
        yield from rng.sample(tasks, len(tasks))
