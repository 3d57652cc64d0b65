"""Where agents run: in child processes (`ProcessHost`), or in threads of the runner (`ThreadHost`).

A host has slots. It tells each attempt's `AttemptWriter` what the agent does, and always ends it: by what the agent
did, or by what became of the process.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol
from weakref import WeakValueDictionary

from prometheus_client import REGISTRY, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from millstream.consumers.runner.attempt import AgentConfig, AttemptRunner, Outcome, open_agent, stopped_by
from millstream.consumers.runner.attempt_writer import AttemptWriter
from millstream.consumers.runner.frames import Frame, FrameReader, Kind, pack
from millstream.producers.agent.attempt import AttemptContext
from millstream.schemas.control import Resources
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.records import ErrorInfo

logger = logging.getLogger(__name__)

STOP_S = 3.0  # for a process to end by itself once it was asked to; it may have things of its own to close
MAX_PENDING = 20_000  # spans not acknowledged yet beyond which a host reads no more: its agents then wait
MAX_PENDING_BYTES = 256 << 20  # likewise, of contents that are not stored yet
PAUSE_S = 0.05
MEMORY_S = 0.2  # between two looks at how much memory the processes hold
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class AgentHost(Protocol):
    """What a runner needs. All of it is called on the runner's loop."""

    @property
    def free(self) -> int:
        """Attempts that could begin now."""

    @property
    def lost(self) -> Exception | None:
        """Why no agent can run here any more."""

    async def start(self) -> None:
        """Raises `ConfigError` if the agent can't be imported."""

    def collect(self) -> Iterable[Metric]:
        """Prometheus' collector, from any thread: what hooks count."""

    def run(self, writer: AttemptWriter) -> None:
        """Begins an attempt; there must be a free slot."""

    def cancel(self, writer: AttemptWriter) -> None:
        """Asks the agent to end. A sync agent can't hear it."""

    def kill(self, writer: AttemptWriter) -> None:
        """Ends the attempt whatever the agent does, and whatever else it takes."""

    async def close(self) -> None:
        """Ends everything that still runs."""


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What a host is told of its runner."""

    concurrency: int  # attempts at a time, in each process
    on_free: Callable[[], None]  # a slot may have become free, or the host may be lost
    on_late_span: Callable[[bytes], None]  # an encoded span of an attempt that has been finished
    on_late_content: Callable[[str, bytes], object]  # likewise, a content by its digest


class ThreadHost:
    """Runs attempts in this process: async agents on an event loop in a thread of its own, so that an agent that
    blocks holds up neither claims nor heartbeats; sync agents in a thread each. Spans are never encoded here."""

    lost: Exception | None = None

    def __init__(self, config: AgentConfig, options: HostOptions) -> None:
        self._config = config
        self._options = options
        self._running: set[AttemptWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="millstream-agents", daemon=True)
        self._home = asyncio.get_running_loop()
        self._attempts: AttemptRunner | None = None

    @property
    def free(self) -> int:
        return self._options.concurrency - len(self._running)

    async def start(self) -> None:
        self._attempts = open_agent(self._config, self._loop)
        self._thread.start()

    def collect(self) -> Iterable[Metric]:
        return REGISTRY.collect()

    def run(self, writer: AttemptWriter) -> None:
        assert self._attempts is not None, "start() first"
        claim = writer.claim
        attempt = AttemptContext(
            claim.task,
            claim.attempt_id,
            writer.emit,
            writer.save_state,
            resources={} if claim.resources is None else claim.resources.items,
            on_calling=writer.calling,
            proxy_url=writer.proxy_url,
            proxy_key=writer.proxy_key,
            gateway_url=self._config.gateway_url,
        )
        self._running.add(writer)
        self._loop.call_soon_threadsafe(self._begin, self._attempts, attempt, writer)

    def cancel(self, writer: AttemptWriter) -> None:
        if self._attempts is not None:
            self._loop.call_soon_threadsafe(self._attempts.cancel, writer.claim.attempt_id)

    def kill(self, writer: AttemptWriter) -> None:
        """A thread can't be killed: the attempt is over, its thread is left to itself."""
        self._end(writer, Outcome(status.LOST))

    async def close(self) -> None:
        idle = True
        if self._thread.is_alive():
            ending = asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)
            try:
                idle = await asyncio.wait_for(asyncio.wrap_future(ending), STOP_S)
            except TimeoutError:  # an agent blocks the loop
                idle = False
        for writer in list(self._running):
            self.kill(writer)
        if idle:
            if self._thread.is_alive():
                self._loop.call_soon_threadsafe(self._loop.stop)
                await asyncio.to_thread(self._thread.join)
            self._loop.close()

    def _begin(self, attempts: AttemptRunner, attempt: AttemptContext, writer: AttemptWriter) -> None:
        """On the agents' loop."""
        writer.started()

        def on_end(outcome: Outcome) -> None:
            with suppress(RuntimeError):  # the runner has long given it up, and its loop is closed
                self._home.call_soon_threadsafe(self._end, writer, replace(outcome, spans=writer.spans))

        attempts.start(attempt, on_end)

    def _end(self, writer: AttemptWriter, outcome: Outcome) -> None:
        self._running.discard(writer)
        writer.end(outcome)
        self._options.on_free()


async def _cancel_all() -> bool:
    """Whether nothing runs any more on this loop. An agent that ignores its end keeps it, and its daemon thread."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    return not tasks or not (await asyncio.wait(tasks, timeout=STOP_S / 3))[1]


class ProcessHost:
    """Runs attempts in child processes. One that dies takes its own attempts along and is replaced.

    ``memory_limit``: MiB that a process may hold (its resident memory, without the processes that it starts).
    ``max_attempts``: how many attempts a process takes; it then ends when they have ended.
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
    ) -> None:
        self.lost: Exception | None = None
        self._config = config
        self._options = options
        self._processes = processes
        self._environment = dict(environment)
        self._metrics: TemporaryDirectory[str] | None = None
        if config.hooks:
            self._metrics = TemporaryDirectory(prefix="millstream-metrics-")
            self._environment["PROMETHEUS_MULTIPROC_DIR"] = self._metrics.name
        self._memory_limit = memory_limit
        self._max_attempts = max_attempts
        self._memory: asyncio.Task[None] | None = None
        self._children: list[_Child] = []
        self._starting: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def free(self) -> int:
        return sum(child.free for child in self._children)

    async def start(self) -> None:
        for _ in range(self._processes):
            self._children.append(self._child())
        if self._memory_limit is not None:
            self._memory = asyncio.get_running_loop().create_task(self._watch_memory(self._memory_limit))
        results = await asyncio.gather(*(child.start() for child in self._children), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result

    def collect(self) -> Iterable[Metric]:
        """Added up over the processes, those that have ended, too."""
        if self._metrics is None:
            return ()
        return MultiProcessCollector(None, self._metrics.name).collect()  # type: ignore[no-any-return, no-untyped-call]

    def run(self, writer: AttemptWriter) -> None:
        child = max(self._children, key=lambda child: child.free)
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

    async def close(self) -> None:
        self._closing = True
        if self._memory is not None:
            self._memory.cancel()
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*(child.close() for child in self._children))
        if self._metrics is not None:
            self._metrics.cleanup()

    def _child(self) -> "_Child":
        # A place of its own among those that live; its successor goes on counting there.
        place = next(p for p in map(str, count()) if all(p != child.place for child in self._children))
        return _Child(place, self._config, self._environment, self._options, self._max_attempts, self._replace)

    def _replace(self, dead: "_Child") -> None:
        if self._closing or dead not in self._children:
            return
        self._children.remove(dead)
        if not dead.retired:
            self._start_another()

    async def _watch_memory(self, limit: int) -> None:
        while True:
            for child in self._children:
                child.check_memory(limit)
            await asyncio.sleep(MEMORY_S)

    def _start_another(self) -> None:
        child = self._child()
        self._children.append(child)
        task = asyncio.get_running_loop().create_task(self._start(child))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _start(self, child: "_Child") -> None:
        try:
            await child.start()
        except MillstreamError as error:
            if child in self._children:
                self._children.remove(child)
            self.lost = error
        self._options.on_free()


class _Child(asyncio.Protocol):
    """One agent process, seen from the runner."""

    def __init__(
        self,
        place: str,
        config: AgentConfig,
        environment: Mapping[str, str],
        options: HostOptions,
        max_attempts: int | None,
        on_death: Callable[["_Child"], None],
    ) -> None:
        self.place = place
        self._config = config
        self._environment = environment
        self._options = options
        self._on_death = on_death
        self._left = sys.maxsize if max_attempts is None else max_attempts
        self._numbers = count(1)
        self._running: dict[int, AttemptWriter] = {}
        self._known: WeakValueDictionary[int, AttemptWriter] = WeakValueDictionary()  # also those that finish
        self._resources: tuple[Resources | None, bytes] = (None, b"")  # the last ones, encoded
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._disconnected = asyncio.Event()
        self._dead: asyncio.Task[None] | None = None
        self._killed = False
        self._cause: Outcome | None = None  # why it was killed, if that is the fault of its attempts
        self._ending: asyncio.Task[None] | None = None

    @property
    def free(self) -> int:
        alive = self._ready.done() and not self._disconnected.is_set() and not self._killed
        return min(self._options.concurrency - len(self._running), self._left) if alive else 0

    @property
    def retired(self) -> bool:
        """Takes no more attempts, and ends when the last of them has ended."""
        return self._left == 0

    def has(self, writer: AttemptWriter) -> bool:
        return writer in self._running.values()

    async def start(self) -> None:
        """Raises `ConfigError` if the agent can't be imported, `MillstreamError` if the process dies of it."""
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C in a terminal reaches the runner alone, and a kill reaches whatever
            # processes the agent has started. -P: our own imports must not find the user's folder.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "millstream.consumers.runner.agent_process",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=self._environment,
                cwd=self._config.folder,
                start_new_session=True,
            )
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        self._send(pack(Kind.CONFIG, head=self.place.encode(), body=json.dumps(asdict(self._config)).encode()))
        self._dead = asyncio.get_running_loop().create_task(self._watch(self._process))
        await self._ready

    def run(self, writer: AttemptWriter) -> None:
        claim = writer.claim
        self._left -= 1
        number = next(self._numbers)
        self._running[number] = self._known[number] = writer
        task = codec.encode(claim.task)
        head = {"attempt_id": claim.attempt_id, "task_bytes": len(task)}
        head |= {"proxy_url": writer.proxy_url, "proxy_key": writer.proxy_key}
        if claim.resources is not None and self._resources[0] is not claim.resources:
            self._resources = (claim.resources, codec.encode(claim.resources.to_control()))
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
        """The process, and whatever it has started."""
        self._killed = True
        if self._process is not None:
            self._kill_group(self._process.pid)

    def _kill_group(self, leader: int) -> None:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(leader, signal.SIGKILL)

    async def close(self) -> None:
        if self._dead is None:
            return
        self._killed = True
        if self._running:
            self.kill()
        else:
            self._send(pack(Kind.STOP))
            await asyncio.wait([self._dead], timeout=STOP_S)
            self.kill()
        await self._dead

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for frame in self._reader.feed(data):
            self._handle(frame)
        if self._full:
            self._hold()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disconnected.set()

    @property
    def _full(self) -> bool:
        running = self._running.values()
        return (
            sum(writer.pending for writer in running) > MAX_PENDING
            or max((writer.pending_bytes for writer in running), default=0) > MAX_PENDING_BYTES
        )

    def _hold(self) -> None:
        """Reads no more until the log has caught up: the agents' sends then wait."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._full:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(PAUSE_S, self._hold)
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
            writer = self._running.pop(frame.number)
            writer.end(_outcome(frame.head))
            if self.retired and not self._running:
                self._ending = asyncio.get_running_loop().create_task(self.close())
            self._options.on_free()
        else:
            found = self._known.get(frame.number)
            if found is None:
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

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Until the process is dead and everything it said has been read."""
        code = await process.wait()
        self._kill_group(process.pid)  # what it has started may hold the socket open
        await asyncio.wait([asyncio.ensure_future(self._disconnected.wait())], timeout=STOP_S)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if not self._ready.done():
            because = "" if self._cause is None or self._cause.error is None else f": {self._cause.error.message}"
            self._ready.set_exception(
                MillstreamError(f"the process of agent {self._config.name} {how} at its start{because}")
            )
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
        for writer in running.values():
            writer.end(outcome)
        self._on_death(self)
        self._options.on_free()


def _outcome(head: bytes) -> Outcome:
    said = json.loads(head)
    error = said["error"]
    return Outcome(
        said["status"], None if error is None else ErrorInfo(**error), said["output"], said["spans"], said["metadata"]
    )
