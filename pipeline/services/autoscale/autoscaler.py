"""Runs as many runners on this machine as there is work: the shell around `scaling`."""

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from millstream.consumers.log.port import Log
from millstream.consumers.unclaimed import UnclaimedTasks
from millstream.consumers.workers import is_alive, read_workers
from millstream.pipeline.services.autoscale.scaling import OwnRunner, ScalePolicy, Scaler
from millstream.pipeline.services.child_roles import ChildRole, RestartPolicy
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas.errors import ConfigError, LogError
from millstream.schemas.wire.records import LONGEST_ATTEMPT_S, Worker
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AutoscalePolicy:
    look_s: float = 2.0  # between two looks at the load; a runner takes longer than that to start
    drain_s: float = 30.0  # for attempts to end once the scaler itself is stopped, as a runner's --drain-s
    restart: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass(slots=True)
class _Child:
    role: ChildRole
    task: Background
    pids: set[int] = field(default_factory=set)  # that it has had
    stopping: bool = False


class Autoscaler:
    """``command`` starts a runner; ``health_port``: of the first, each further one has the next; 0: none.

    A runner that dies is started again, later each time. One that is stopped because there is less work ends its
    attempts first, however long they take.
    """

    def __init__(
        self,
        log: Log,
        topics: Topics,
        command: Sequence[str],
        scale: ScalePolicy,
        policy: AutoscalePolicy = AutoscalePolicy(),
        *,
        health_port: int = 0,
    ) -> None:
        self._log = log
        self._topics = topics
        self._command = [*command, "--drain-s", f"{LONGEST_ATTEMPT_S:g}"]
        self._scaler = Scaler(scale)
        self._policy = policy
        self._restart = replace(policy.restart, drain_s=LONGEST_ATTEMPT_S)
        self._health_port = health_port
        self._tasks = UnclaimedTasks(log, topics)
        self._host = socket.gethostname()
        self._children: dict[int, _Child] = {}
        self._wanted: int | None = None
        self._misconfigured = False

    @property
    def pids(self) -> list[int]:
        """Of the runners that run and are not being stopped."""
        found = [child.role.pid for child in self._children.values() if not child.stopping]
        return [pid for pid in found if pid is not None]

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until ``stop``, then stops all runners. Raises `ConfigError` if a runner ends with its exit code: its
        next start would end the same way."""
        try:
            while not stop.is_set() and not self._misconfigured:
                try:
                    await self._look()
                except LogError as error:
                    logger.warning("the load can't be read, the runners stay as they are: %s", error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), self._policy.look_s)
        finally:
            await self._drain()
        if self._misconfigured:
            raise ConfigError(f"a runner ended with exit code {ConfigError.exit_code}: it has written the reason")

    async def _drain(self) -> None:
        children = list(self._children.values())
        try:
            async with asyncio.timeout(self._policy.drain_s):
                await asyncio.gather(*(child.role.stop() for child in children))
        except TimeoutError:
            logger.warning("attempts did not end within %g s; others retry them", self._policy.drain_s)
        for child in children:
            await child.task.close()

    async def _look(self) -> None:
        unclaimed = await self._tasks.read()
        now = time.time_ns()
        workers = [worker for worker in await read_workers(self._log, self._topics) if is_alive(worker, now)]
        for child in self._children.values():
            child.pids |= {pid for pid in (child.role.pid,) if pid is not None}
        mine = {(self._host, pid) for child in self._children.values() for pid in child.pids}
        work = sum(unclaimed.tasks.values()) + sum(worker.running for worker in workers)
        others = sum(worker.slots for worker in workers if _process(worker) not in mine)
        own = [self._reported(number, workers) for number, child in self._children.items() if not child.stopping]
        decision = self._scaler.decide(time.monotonic(), work, others, own)
        if decision.wanted != self._wanted:
            logger.info("%d tasks wait or run: %d runners are wanted, there are %d", work, decision.wanted, len(own))
            self._wanted = decision.wanted
        for _ in range(decision.start):
            self._start()
        for number in decision.stop:
            child = self._children[number]
            child.stopping = True
            supervisor().job(f"stop {child.role.name}", child.role.stop())

    def _reported(self, number: int, workers: Sequence[Worker]) -> OwnRunner:
        """The last report of the process that runs now."""
        process = (self._host, self._children[number].role.pid)
        report = next((worker for worker in workers if _process(worker) == process), None)
        return OwnRunner(number) if report is None else OwnRunner(number, report.slots, report.running)

    def _start(self) -> None:
        number = next(n for n in range(len(self._children) + 1) if n not in self._children)
        port = ["--health-port", str(self._health_port + number)] if self._health_port else []
        role = ChildRole(f"runner {number}", [*self._command, *port], policy=self._restart)
        self._children[number] = _Child(role, supervisor().job(role.name, self._keep(number, role)))

    async def _keep(self, number: int, role: ChildRole) -> None:
        code = await role.run()
        del self._children[number]
        self._misconfigured = self._misconfigured or code == ConfigError.exit_code


def _process(worker: Worker) -> tuple[str, int]:
    """Host and process id, which a worker's id contains (`producers.workers.new_worker_id`)."""
    pid = worker.worker_id.rpartition("-")[0].rpartition("-")[2]
    return worker.host, int(pid) if pid.isdecimal() else 0
