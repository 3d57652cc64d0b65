"""Keeps a child process running: one that dies is started again, later each time. It ends when this process does.

`millstream up` and `millstream autoscale` run their roles with it.
"""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from millstream.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

_DIES_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG of prctl(2)
_libc: Final = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before a fork


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    first_s: float = 0.5  # a crash by chance costs half a second
    longest_s: float = 30.0  # a broker that is away for an hour is asked twice a minute
    steady_s: float = 60.0  # a process that has run this long has started well: the next wait is the first one again
    drain_s: float = 90.0  # above the longest drain of a role, a proxy's 60 s


class ChildRole:
    """``restarts``: whether an exit code is a reason to start it again; by default each but 0 and 2, which would come
    again (`docs/deployment.md` lists them). A death by a signal has the signal's number, negative."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        restarts: Callable[[int], bool] = lambda code: code not in (0, ConfigError.exit_code),
        policy: RestartPolicy = RestartPolicy(),
    ) -> None:
        self.name = name
        self.starts = 0
        self._command = command
        self._environment = environment
        self._restarts = restarts
        self._policy = policy
        self._process: asyncio.subprocess.Process | None = None
        self._stopped = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """None while it is not running."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def run(self) -> int:
        """Runs it until `stop` is called or it ends for good. Returns its last exit code. Cancelled, kills it.

        Raises `ConfigError` if the command does not exist.
        """
        wait_s = self._policy.first_s
        try:
            while True:
                began = asyncio.get_running_loop().time()
                code = await self._run_once()
                if self._stopped.is_set() or not self._restarts(code):
                    return code
                if asyncio.get_running_loop().time() - began >= self._policy.steady_s:
                    wait_s = self._policy.first_s
                logger.warning("%s %s; it is started again in %g s", self.name, how_ended(code), wait_s)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), wait_s)
                    return code
                wait_s = min(wait_s * 2, self._policy.longest_s)
        finally:
            self._signal(signal.SIGKILL)

    def kill(self) -> None:
        self._stopped.set()
        self._signal(signal.SIGKILL)

    async def stop(self) -> None:
        """Lets it end gracefully, and kills it after ``drain_s``. Returns when it has ended."""
        self._stopped.set()
        self._signal(signal.SIGTERM)
        if (process := self._process) is not None:
            try:
                await asyncio.wait_for(process.wait(), self._policy.drain_s)
            except TimeoutError:
                logger.error("%s did not end within %g s, it is killed", self.name, self._policy.drain_s)
                self._signal(signal.SIGKILL)
                await process.wait()

    async def _run_once(self) -> int:
        try:
            # A session of its own: Ctrl-C in a terminal reaches this process alone, which decides on the order.
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            raise ConfigError(f"{self.name} can't be started: {self._command[0]}: {error.strerror}") from error
        self.starts += 1
        if self._stopped.is_set():  # while it was being started
            self._signal(signal.SIGTERM)
        return await self._process.wait()

    def _signal(self, sign: signal.Signals) -> None:
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, sign)


def how_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _die_with_parent() -> None:
    """Runs between fork and exec: no role outlives a killed supervisor."""
    if _libc is not None:
        _libc.prctl(_DIES_WITH_PARENT, signal.SIGTERM)
