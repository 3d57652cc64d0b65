"""Starts the roles of a deployment on this machine and keeps them running."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from millstream.pipeline.models.vllm_process import die_with_parent
from millstream.schemas.errors import MillstreamError

STOP_S = 30.0  # how long a role may take to stop gracefully
YOUNG_S = 5.0  # a role that ends sooner than this after its start is counted as broken
MAX_YOUNG_DEATHS = 3


class Processes:
    """Role processes, each with a log file in ``folder``. They end with this process, even if it is killed.

    ``processes.json`` in the folder has their pids: for you, or a test, to kill one.
    """

    def __init__(self, folder: Path, env: Mapping[str, str], say: Callable[[str], None] = lambda text: None) -> None:
        self._folder = folder
        self._env = dict(env)
        self._say = say
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._argv: dict[str, Sequence[str]] = {}
        self._more: dict[str, Mapping[str, str]] = {}
        self._visible: dict[str, bool] = {}
        self._born: dict[str, float] = {}
        self._young_deaths: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(
        self, name: str, *arguments: str, inherit_output: bool = False, more: Mapping[str, str] | None = None
    ) -> None:
        """Starts ``millstream ARGUMENTS``, detached from the terminal's signals. ``more``: variables of its own."""
        self._argv[name] = arguments
        self._more[name] = more or {}
        self._visible[name] = inherit_output
        self._start(name)

    def _start(self, name: str) -> None:
        self._born[name] = time.monotonic()
        output = None if self._visible[name] else (self._folder / f"{name}.log").open("ab")
        try:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "millstream.pipeline", *self._argv[name]],
                env=self._env | dict(self._more[name]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        finally:
            if output:
                output.close()
        self._write_pids()

    def check(self, job: str = "") -> int | None:
        """Restarts roles that have ended, and ``job`` if it was killed; once it has ended by itself, returns its exit
        code. Raises `MillstreamError` with the end of the log if one keeps ending right after its start."""
        for name, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            if name == job and code >= 0:
                return code
            young = time.monotonic() - self._born[name] < YOUNG_S
            self._young_deaths[name] = self._young_deaths.get(name, 0) + 1 if young else 0
            if self._young_deaths[name] >= MAX_YOUNG_DEATHS:
                raise MillstreamError(f"{name} keeps ending ({_how(process)}):\n{self._last_lines(name)}")
            self._say(f"{name} ended ({_how(process)}); restarting it")
            self._start(name)
        return None

    def stop(self, name: str, patience_s: float = STOP_S) -> None:
        """Stops a role gracefully; kills it after ``patience_s``."""
        process = self._running.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._say(f"{name} did not end within {patience_s:g} s and was killed")
            process.kill()
            process.wait()
        self._write_pids()

    def stop_all(self, patience_s: float = STOP_S) -> None:
        """Stops all that still run, in reverse order of their start."""
        for name in reversed(list(self._running)):
            self.stop(name, patience_s)

    def _write_pids(self) -> None:
        pids = {name: process.pid for name, process in self._running.items()}
        (self._folder / "processes.json").write_text(json.dumps(pids))

    def _last_lines(self, name: str) -> str:
        log = self._folder / f"{name}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""


def _how(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
