"""One agent process, as the runner sees it: started, fed with tasks, read from, killed."""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from millstream.consumers.runner.agent import AgentConfig
from millstream.consumers.runner.attempt_writer import AttemptWriter
from millstream.consumers.runner.hosts.agent_user import AgentUser
from millstream.consumers.runner.hosts.frames import BadFrame, Frame, FrameReader, Kind, pack
from millstream.consumers.runner.hosts.port import HostOptions
from millstream.consumers.runner.outcome import Outcome, stopped_by
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas.control import Resources
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.records import ErrorInfo
from millstream.schemas.wire.span_codec import text

logger = logging.getLogger(__name__)

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
IDENTITIES: Final = 10_000  # attempts whose late spans are accepted


class AgentChild(asyncio.Protocol):
    """``place``: the name of its metrics file. ``on_death``: called once the process is dead and all it sent has been
    read. ``alone``: it was started for one attempt, and takes no other."""

    def __init__(
        self,
        place: str,
        config: AgentConfig,
        environment: Mapping[str, str],
        options: HostOptions,
        max_attempts: int | None,
        on_death: Callable[["AgentChild"], None],
        user: AgentUser | None = None,
        *,
        alone: bool = False,
    ) -> None:
        self.place = place
        self.alone = alone
        self._config = config
        self._environment = environment
        self._options = options
        self._on_death = on_death
        self._as_user: dict[str, Any] = (
            {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": []}
        )
        self._left = sys.maxsize if max_attempts is None else max_attempts
        self._numbers = count(1)
        self._running: dict[int, AttemptWriter] = {}
        self._known: WeakValueDictionary[int, AttemptWriter] = WeakValueDictionary()  # also those that are finishing
        self._identities: dict[int, bytes] = {}  # by number, also of attempts that have ended
        self._resources: tuple[Resources | None, bytes] = (None, b"")  # the last ones, encoded
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._disconnected = asyncio.Event()
        self._dead: Background | None = None
        self._killed = False
        self._cause: Outcome | None = None  # why it was killed, if its attempts are the reason
        self._stopping = False  # as planned
        self._supervisor = supervisor()

    @property
    def alive(self) -> bool:
        return self._ready.done() and not self._disconnected.is_set() and not self._killed

    @property
    def pid(self) -> int | None:
        """None before its start and after its end."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    @property
    def free(self) -> int:
        return min(self._options.concurrency - len(self._running), self._left) if self.alive else 0

    @property
    def retired(self) -> bool:
        """It takes no more attempts, and ends when its last attempt has ended."""
        return self._left == 0

    def has(self, writer: AttemptWriter) -> bool:
        return writer in self._running.values()

    async def start(self) -> None:
        """Raises `ConfigError` if the agent can't be imported, `MillstreamError` if the process dies, and `OSError` if
        there is none: it may then be called again."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # A session of its own: Ctrl-C in a terminal reaches the runner alone, and a kill reaches all processes
                # that the agent has started. -P: our own imports must not find the user's folder.
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",
                    "-m",
                    "millstream.consumers.runner.hosts.process_main",
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=self._environment,
                    cwd=self._config.folder,
                    start_new_session=True,
                    **self._as_user,
                )
            except OSError:
                ours.close()
                raise
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        self._send(pack(Kind.CONFIG, head=self.place.encode(), body=json.dumps(asdict(self._config)).encode()))
        self._dead = self._supervisor.job(f"agent process {self._process.pid}", self._watch(self._process))
        await self._ready

    def run(self, writer: AttemptWriter) -> None:
        claim = writer.claim
        self._left -= 1
        number = next(self._numbers)
        self._running[number] = self._known[number] = writer
        self._identities[number] = _identity(claim.task.rollout_id, claim.attempt_id)
        if len(self._identities) > IDENTITIES:
            del self._identities[next(iter(self._identities))]
        task = codec.encode(claim.task)
        head = {"attempt_id": claim.attempt_id, "task_bytes": len(task)}
        head |= {"proxy_url": writer.proxy_url, "proxy_key": writer.proxy_key}
        if claim.resources is not None and self._resources[0] is not claim.resources:
            self._resources = (claim.resources, codec.encode(claim.resources.to_control(0)))
        self._send(pack(Kind.TASK, number, json.dumps(head).encode(), task + self._resources[1]))

    def cancel(self, writer: AttemptWriter) -> None:
        for number, running in self._running.items():
            if running is writer:
                self._send(pack(Kind.CANCEL, number))

    def check_memory(self, limit: int) -> None:
        """Kills the process if it holds more than ``limit`` MiB."""
        if self._process is None or self._killed:
            return
        try:
            held = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * PAGE_BYTES / (1 << 20)
        except OSError:  # it has just ended
            return
        if held > limit:
            message = f"the agent process held {held:.0f} MiB of memory, the limit (--memory-limit) is {limit}"
            logger.error("%s: it is killed", message)
            self._cause = stopped_by(status.FAILED, "memory", message)
            self.kill()

    def kill(self) -> None:
        """Kills the process, and all that it has started."""
        self._killed = True
        if self._process is not None:
            self._kill_group(self._process.pid)

    def _kill_group(self, leader: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(leader, signal.SIGKILL)

    async def close(self) -> None:
        if self._dead is None:
            return
        self._stopping = not self._killed
        self._killed = True
        if self._running:
            self.kill()
        else:
            self._send(pack(Kind.STOP))
            await asyncio.wait([self._dead.task], timeout=self._options.policy.stop_s)
            self.kill()
        await asyncio.wait([self._dead.task])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._killed:
            return
        try:
            for frame in self._reader.feed(data):
                self._handle(frame)
        except (BadFrame, ValueError, LookupError, TypeError) as error:  # not sent by our code in it
            message = f"the agent process sent what can't be read: {type(error).__name__}: {error}"
            logger.error("%s: it is killed", message)
            self._cause = stopped_by(status.FAILED, "frame", message)
            self.kill()
        if self._full:
            self._hold()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disconnected.set()

    @property
    def _full(self) -> bool:
        running, policy = self._running.values(), self._options.policy
        return (
            sum(writer.pending for writer in running) > policy.pending_spans
            or max((writer.pending_bytes for writer in running), default=0) > policy.pending_bytes
        )

    def _hold(self) -> None:
        """Stops reading until the log has caught up: the agents' sends then wait."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._full:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(self._options.policy.pending_check_s, self._hold)
        else:
            self._transport.resume_reading()

    def _handle(self, frame: Frame) -> None:
        kind = frame.kind
        if kind is Kind.READY:
            if not self._ready.done():  # else: closed meanwhile
                self._ready.set_result(None)
        elif kind is Kind.REFUSED:
            self._ready.set_exception(ConfigError(frame.head.decode()))
        elif kind is Kind.ENDED:
            if frame.number not in self._running:
                return
            outcome = _outcome(frame.head)
            self._running.pop(frame.number).end(outcome)
            if self.retired and not self._running:
                self._supervisor.job("end of an agent process", self.close())
            self._options.on_free()
        else:
            identity = self._identities.get(frame.number)
            found = self._known.get(frame.number)
            if identity is None or (kind is Kind.SPAN and identity not in frame.body):
                # An agent's own code can reach the socket, and must not write to other rollouts.
                logger.warning("process %s: dropped a %s that is not of an attempt there", self.place, kind.name)
            elif found is None:
                if kind is Kind.SPAN:
                    self._options.on_late_span(frame.body)
                elif kind is Kind.BLOB:
                    self._options.on_late_content(frame.head.decode(), frame.body)
            elif kind is Kind.SPAN:
                span_kind, *contents = frame.head.decode().split()
                found.span(frame.body, span_kind, contents)
            elif kind is Kind.BLOB:
                found.content(frame.head.decode(), frame.body)
            elif kind is Kind.STATE:
                found.save_state(frame.body)
            elif kind is Kind.CALLING:
                found.calling(bool(frame.head))
            elif kind is Kind.SPAN_REFUSED:
                found.refuse("undecodable", frame.head.decode())
            else:
                found.started()

    def _send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _reason(self, code: int) -> str:
        if self._stopping:
            return "stopped"
        if self._cause is not None and self._cause.error is not None:
            return self._cause.error.type
        if self._killed:
            return "killed"
        return "signal" if code < 0 else "exit"

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Waits until the process is dead and all it sent has been read; then ends its attempts."""
        code = await process.wait()
        self._kill_group(process.pid)  # its own children may hold the socket open
        with suppress(TimeoutError):
            await asyncio.wait_for(self._disconnected.wait(), self._options.policy.stop_s)
        self._options.on_process_ended(self._reason(code))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if not self._ready.done():
            because = "" if self._cause is None or self._cause.error is None else f": {self._cause.error.message}"
            message = f"the process of agent {self._config.name} {how} at its start{because}"
            self._ready.set_exception(MillstreamError(message))
        if self._cause is not None:
            outcome = self._cause
        elif self._killed:
            outcome = stopped_by(
                status.LOST, "killed", f"its agent process {how}, because another attempt had to be ended"
            )
        else:
            cause = "signal" if code < 0 else "exit"
            outcome = stopped_by(status.FAILED, cause, f"the agent process {how}")
        running, self._running = self._running, {}
        if len(running) > 1 and outcome.status == status.FAILED and outcome.error is not None:
            message = f"{outcome.error.message}, with {len(running)} attempts in it: one of them ended it"
            outcome = stopped_by(status.LOST, status.CRASH, message)
        for writer in running.values():
            writer.end(outcome)
        self._on_death(self)
        self._options.on_free()


def _identity(rollout_id: str, attempt_id: str) -> bytes:
    """What the encoded spans of an attempt hold: three fields in a row (`schemas.wire.span_codec`)."""
    return b"".join(map(text, (rollout_id, attempt_id, semconv.SOURCE_AGENT)))


def _outcome(head: bytes) -> Outcome:
    fields = json.loads(head)
    error = None if fields["error"] is None else ErrorInfo(**fields["error"])
    return Outcome(**fields | {"error": error})
