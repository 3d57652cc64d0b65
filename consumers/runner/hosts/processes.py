"""Runs agents in child processes of the runner."""

import asyncio
import errno
import logging
import os
import sys
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any, Final

from prometheus_client import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from millstream.consumers.runner.agent import AgentConfig
from millstream.consumers.runner.attempt_writer import AttemptWriter
from millstream.consumers.runner.hosts.agent_user import AgentUser
from millstream.consumers.runner.hosts.port import HostOptions
from millstream.consumers.runner.hosts.process_handle import AgentChild
from millstream.consumers.runner.outcome import Outcome, stopped_by
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.wire import status

logger = logging.getLogger(__name__)

# Why a process can't be started now, although it could be before: too many processes, files, or too little memory.
TEMPORARY: Final = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)

# The environment of every agent process; nothing else unless it is named: no settings of ours, no secrets.
ENVIRONMENT: Final = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE")
ENVIRONMENT_PREFIXES: Final = ("LC_", "PYTHON")


def agent_environment(names: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of an agent process: the basics and the named variables.

    Raises `ConfigError` for a name that is not set.
    """
    environment = os.environ if environment is None else environment
    for name in names:
        if name not in environment:
            raise ConfigError(f"--env {name}: there is no such environment variable; set it, or leave it out")
    return {
        name: value
        for name, value in environment.items()
        if name in ENVIRONMENT or name in names or name.startswith(ENVIRONMENT_PREFIXES)
    }


class ProcessHost:
    """A process that dies ends its own attempts only, and is replaced. While none can be started, it is tried again.

    ``memory_limit``: MiB that a process may hold (its resident memory, without the processes that it starts).
    ``max_attempts``: how many attempts a process takes; it ends once they have ended. ``user``: whom the processes run
    as; None: the runner's own user.
    """

    def __init__(
        self,
        config: AgentConfig,
        options: HostOptions,
        *,
        processes: int,
        environment: Mapping[str, str],
        memory_limit: int | None = None,
        max_attempts: int | None = None,
        user: AgentUser | None = None,
    ) -> None:
        self.lost: Exception | None = None
        self._config = replace(config, one_at_a_time=options.concurrency == 1)
        self._options = options
        self._processes = processes
        self._environment = dict(environment)
        self._user = user
        if user is not None:
            self._environment |= {"HOME": user.home, "USER": user.name}
        self._metrics: TemporaryDirectory[str] | None = None
        if config.hooks:
            self._metrics = TemporaryDirectory(prefix="millstream-metrics-")
            self._environment["PROMETHEUS_MULTIPROC_DIR"] = self._metrics.name
            if user is not None:
                os.chown(self._metrics.name, user.uid, user.gid)
        self._memory_limit = memory_limit
        self._max_attempts = max_attempts
        self._memory: Background | None = None
        self._children: list[AgentChild] = []
        self._starting: set[Background] = set()
        self._supervisor = supervisor()
        self._alone: dict[AttemptWriter, AgentChild] = {}  # those whose process is being started
        self._failing_since: float | None = None  # no process could be started since
        self._closing = False

    @property
    def free(self) -> int:
        alone = sum(child.alone for child in self._children)
        return max(sum(child.free for child in self._children if not child.alone) - alone, 0)

    @property
    def free_alone(self) -> int:
        return self._processes - sum(child.alone for child in self._children)

    @property
    def starving_s(self) -> float:
        since = self._failing_since  # read once: other threads call this
        return 0.0 if since is None or any(child.alive for child in tuple(self._children)) else time.monotonic() - since

    @property
    def pids(self) -> Sequence[int]:
        return [pid for child in tuple(self._children) if (pid := child.pid) is not None]

    async def start(self) -> None:
        for _ in range(self._processes):
            self._children.append(self._child())
        if self._memory_limit is not None:
            self._memory = self._supervisor.loop("memory limit", self._watch_memory(self._memory_limit))
        results = await asyncio.gather(*map(self._started, self._children), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result

    def collect(self) -> Iterable[Metric]:
        """Summed over all processes, including those that have ended."""
        if self._metrics is None:
            return ()
        return MultiProcessCollector(None, self._metrics.name).collect()  # type: ignore[no-any-return, no-untyped-call]

    def run(self, writer: AttemptWriter, *, alone: bool = False) -> None:
        if alone:
            self._alone[writer] = child = self._child(alone=True)
            self._children.append(child)
            self._begin(self._start_alone(child, writer))
            return
        child = max((child for child in self._children if not child.alone), key=lambda child: child.free)
        child.run(writer)
        if child.retired:
            self._start_another()

    def cancel(self, writer: AttemptWriter) -> None:
        for child in self._children:
            child.cancel(writer)

    def kill(self, writer: AttemptWriter) -> None:
        for child in self._children:
            if child.has(writer):
                child.kill()
        if writer in self._alone:
            writer.end(Outcome(status.LOST))

    async def close(self) -> None:
        self._closing = True
        if self._memory is not None:
            self._memory.cancel()
        for task in self._starting:
            task.cancel()
        for writer in self._alone:
            writer.end(Outcome(status.LOST))
        await asyncio.gather(*(child.close() for child in self._children))
        if self._metrics is not None:
            self._metrics.cleanup()

    def _child(self, *, alone: bool = False) -> AgentChild:
        # A metrics file that no living process uses; its successor continues counting there.
        place = next(p for p in map(str, count()) if all(p != child.place for child in self._children))
        most = 1 if alone else self._max_attempts
        return AgentChild(
            place, self._config, self._environment, self._options, most, self._replace, self._user, alone=alone
        )

    def _replace(self, dead: AgentChild) -> None:
        if self._closing or dead not in self._children:
            return
        self._children.remove(dead)
        if not dead.retired and not dead.alone:
            self._start_another()

    async def _watch_memory(self, limit: int) -> None:
        while True:
            for child in self._children:
                child.check_memory(limit)
            await asyncio.sleep(self._options.policy.memory_check_s)

    def _start_another(self) -> None:
        child = self._child()
        self._children.append(child)
        self._begin(self._start(child))

    def _begin(self, start: Coroutine[Any, Any, None]) -> None:
        starting = self._supervisor.job("start of an agent process", start)
        self._starting.add(starting)
        starting.task.add_done_callback(lambda _: self._starting.discard(starting))

    async def _start(self, child: AgentChild) -> None:
        try:
            await self._started(child)
        except MillstreamError as error:
            if child in self._children:
                self._children.remove(child)
            self.lost = error
        self._options.on_free()

    async def _start_alone(self, child: AgentChild, writer: AttemptWriter) -> None:
        try:
            await self._started(child)
            if writer.outcome.done():  # ended meanwhile
                await child.close()
            else:
                child.run(writer)
        except MillstreamError as error:  # it was killed, or the agent no longer starts, which its neighbours report
            if child in self._children:
                self._children.remove(child)
            writer.end(stopped_by(status.LOST, "exit", str(error)))
            self._options.on_free()
        finally:
            del self._alone[writer]

    async def _started(self, child: AgentChild) -> None:
        """Starts a process, with a backoff while the machine has no room for it. Raises what `AgentChild.start` does,
        and `MillstreamError` instead of `OSError`."""
        wait_s, longest_s = self._options.policy.start_backoff_s
        while True:
            try:
                await child.start()
            except OSError as error:
                reason = f"no process can be started for agent {self._config.name}: {error}"
                if error.errno == errno.EACCES and self._user is not None:
                    folder = self._config.folder
                    reason += f"; user {self._user.name} must be able to run {sys.executable} and to read {folder}"
                if error.errno not in TEMPORARY:
                    raise MillstreamError(reason) from error
                if self._failing_since is None:
                    self._failing_since = time.monotonic()
                logger.warning("%s; next try in %.1f s", reason, wait_s)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, longest_s)
            else:
                self._failing_since = None
                return
