"""Follows the control topic and keeps what applies now: cancels, pauses, resources, splits and the latest
routing."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from millstream.consumers.log.port import Consumer, Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas.control import Resources, RoutingTable, Split
from millstream.schemas.errors import CodecError, ConfigError, LogError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import Control, RolloutTask
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControlPolicy:
    """How the topic is read, and how much of it is kept."""

    poll_s: float = 0.2  # also the latency of `wait_until_current`
    retry_s: float = 1.0  # after an error of the log
    # The last ones, and the latest of each experiment. Tasks are pinned to one that was the latest when they were
    # published: those of a queue that is longer than so many versions of a policy fail.
    versions: int = 1000
    cancels: int = 100_000  # the last ones; older ones are of tasks that have long ended


class ControlFollower:
    """Reads the topic from its beginning and follows it; the last record of a key applies (compaction leaves older ones
    in the active segment). Use it on one event loop. Calls ``on_cancel`` at each cancel and ``on_control`` with each
    record. A record that can't be used, also by ``on_control``, is logged and ignored."""

    def __init__(
        self,
        log: Log,
        topics: Topics,
        on_cancel: Callable[[], None] = lambda: None,
        on_control: Callable[[Control], None] = lambda record: None,
        policy: ControlPolicy = ControlPolicy(),
    ) -> None:
        self._policy = policy
        self._log = log
        self._partition = Partition(topics.control, 0)
        self._on_cancel = on_cancel
        self._on_control = on_control
        self._paused: set[str] = set()  # experiments
        self._cancels: dict[str, None] = {}  # "group:g1", in the order in which they came
        self._resources: dict[str, Resources] = {}  # in the order in which they came
        self._latest: dict[str, str] = {}  # experiment → resources version
        self._splits: dict[str, Split] = {}  # by experiment; also those that have ended
        self.routing = RoutingTable()  # latest
        self._waiters: list[asyncio.Future[None]] = []
        self._task: Background | None = None

    async def start(self) -> None:
        """Starts reading. Returns once it has read everything that the topic holds now."""
        consumer = self._log.consumer()
        await consumer.assign([self._partition])
        self._task = supervisor().loop("control", self._follow(consumer))
        await self.wait_until_current()

    async def close(self) -> None:
        if self._task is not None:
            await self._task.close()

    async def wait_until_current(self) -> None:
        """Returns once it has read everything that the topic holds at this call.

        Raises the error that ended the follower, if any."""
        assert self._task is not None, "start() first"
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await asyncio.wait([waiter, self._task.task], return_when=asyncio.FIRST_COMPLETED)
        if not waiter.done():
            self._task.task.result()

    @property
    def pauses(self) -> bool:
        """Whether any experiment is paused."""
        return bool(self._paused)

    def pinned(self, resources_id: str) -> Resources | None:
        """The version with this id."""
        return self._resources.get(resources_id)

    def latest(self, experiment_id: str) -> Resources | None:
        """The experiment's latest version, or the latest one that has no experiment."""
        found = self._latest.get(experiment_id) or self._latest.get("")
        return None if found is None else self._resources[found]

    def version_for(self, experiment_id: str, rollout_id: str) -> str | None:
        """The version that a rollout works with if its task names none: that of its share in a split, or else the
        latest. None without any."""
        split, latest = self._splits.get(experiment_id), self.latest(experiment_id)
        if latest is None:
            return None
        if split is not None and split.latest == latest.resources_id:
            return split.choose(rollout_id)
        return latest.resources_id

    def all_latest(self) -> list[Resources]:
        """The latest version of each experiment."""
        return [self._resources[found] for found in self._latest.values()]

    def cancelled(self, task: RolloutTask) -> str | None:
        """The task's cancelled rollout, group or experiment, as text ("group g1"). None if it is not cancelled."""
        for scope, name in (
            ("rollout", task.rollout_id),
            ("group", task.group_id),
            ("experiment", task.experiment_id),
        ):
            if f"{scope}:{name}" in self._cancels:
                return f"{scope} {name}"
        return None

    def waits(self, task: RolloutTask) -> bool:
        """Whether the task can't be claimed now: its experiment is paused and the task is not cancelled."""
        return task.experiment_id in self._paused and self.cancelled(task) is None

    async def _follow(self, consumer: Consumer) -> None:
        """Retries every error of the log, a refusal as well: its permission may come back."""
        assert self._task is not None
        try:
            while True:
                try:
                    await self._step(consumer)
                    self._task.succeeded()
                except LogError as error:
                    logger.warning("the control topic can't be read, retrying: %s", error)
                    await asyncio.sleep(self._policy.retry_s)
        finally:
            await consumer.close()

    async def _step(self, consumer: Consumer) -> None:
        waiters, self._waiters = self._waiters, []
        try:
            if waiters:
                end = (await consumer.end_offsets([self._partition]))[self._partition]
                while (consumer.position(self._partition) or 0) < end:
                    await self._poll(consumer)
            else:
                await self._poll(consumer)
        except LogError:
            self._waiters += waiters
            raise
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _poll(self, consumer: Consumer) -> None:
        for record in await consumer.poll(500, self._policy.poll_s):
            self._apply(record)

    def _apply(self, record: LogRecord) -> None:
        try:
            self._take(codec.decode_as(Control, record.value))
        except (CodecError, ConfigError) as error:
            logger.error("ignoring %s: %s", record.place, error)
        except Exception:  # a fault of ours: without this record the role is better off than without control
            logger.exception("ignoring %s", record.place)

    def _take(self, control: Control) -> None:
        if control.kind == Resources.kind:
            self._keep(Resources.from_control(control))
        elif control.kind == Split.kind:
            self._splits[control.name] = Split.from_control(control)
        elif control.kind == RoutingTable.kind and control.name > self.routing.table_id:
            self.routing = RoutingTable.from_control(control)
        elif control.kind == "pause" and control.body not in ("true", "false"):
            raise ConfigError(f"pause {control.name}: {control.body[:100]!r} is neither true nor false")
        self._on_control(control)
        if control.kind == "cancel":
            self._cancels[control.name] = None
            while len(self._cancels) > self._policy.cancels:
                del self._cancels[next(iter(self._cancels))]
            self._on_cancel()
        elif control.kind == "pause":
            (self._paused.add if control.body == "true" else self._paused.discard)(control.name)

    def _keep(self, version: Resources) -> None:
        self._resources[version.resources_id] = version
        known = self._latest.get(version.experiment_id, "")
        self._latest[version.experiment_id] = max(known, version.resources_id)
        if len(self._resources) - len(self._latest) > self._policy.versions:
            used = {*self._latest.values(), *(each for split in self._splits.values() for each in split.shares)}
            oldest = next((each for each in self._resources if each not in used), None)
            if oldest is not None:
                del self._resources[oldest]


async def read_pauses(log: Log, topics: Topics) -> list[Control]:
    """The pause records of the experiments that are paused now, by name."""
    found: dict[str, Control] = {}
    async for control in _read(log, topics):
        if control.kind == "pause":
            found[control.name] = control
    return sorted((c for c in found.values() if c.body == "true"), key=lambda control: control.name)


async def find_experiment(log: Log, topics: Topics, wanted: str) -> str:
    """The id of the newest experiment of the run ``wanted``; ``wanted`` itself if no run has that name."""
    newest: Control | None = None
    async for control in _read(log, topics):
        if control.kind == "experiment" and json.loads(control.body).get("run") == wanted:
            newest = max(newest or control, control, key=lambda record: record.created_at)
    return wanted if newest is None else newest.name


async def _read(log: Log, topics: Topics) -> AsyncIterator[Control]:
    async with aclosing(read_to_end(log, [Partition(topics.control, 0)])) as records:
        async for record in records:
            try:
                yield codec.decode_as(Control, record.value)
            except CodecError as error:
                logger.warning("ignoring %s: %s", record.place, error)
