"""An agent process: ``python -P -m millstream.consumers.runner.hosts.process_main FD``, started by `process_handle`.

It holds the agent and runs its attempts, without access to the log. It receives tasks and sends spans over the socket
FD (`frames`), and ends when the socket does: it never outlives its runner.
"""

import asyncio
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from queue import SimpleQueue
from typing import Final

from millstream.consumers.runner.agent import AgentConfig
from millstream.consumers.runner.attempt import AttemptRunner, open_agent, run_forever
from millstream.consumers.runner.hosts.frames import MAX_BYTES, Frame, FrameReader, Kind, pack
from millstream.consumers.runner.outcome import Outcome, name_signals_in_threads, stopped_by
from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.producers.agent.printed_streams import keep_printed
from millstream.producers.log_lines import rollout_fields, write_logs
from millstream.producers.printed import Printed
from millstream.producers.supervisor import supervised, supervisor
from millstream.schemas.control import Resources
from millstream.schemas.errors import BackgroundFailed, CodecError, ConfigError
from millstream.schemas.spans import blobs
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.records import Control, RolloutTask, Span

logger = logging.getLogger(__name__)

FLUSH_S: Final = 0.02  # spans wait this long for others, unless their attempt ends
FLUSH_BYTES: Final = 64 << 10
RECEIVE_BYTES: Final = 256 << 10
SPAN: Final = Kind.SPAN  # looking up a member of an Enum is slow


def _end_with_runner() -> None:
    """The runner is gone: ends this process and all that the agent has started (it leads a process group)."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _end_after_failure(_: BackgroundFailed) -> None:
    """Ends a process that would hear or send nothing any more: the runner starts another one."""
    faulthandler.dump_traceback(all_threads=True)
    _end_with_runner()


class Channel:
    """Sends frames to the runner. Spans are collected for a moment: a system call for each would wake the runner each
    time."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._lock = threading.Lock()
        self._filled = threading.Event()
        self._forked = False
        self._warned = False
        os.register_at_fork(after_in_child=self._close_in_fork)
        supervisor().thread("millstream-flush", self._flush_regularly)

    def send(self, frame: Callable[[], bytes], *, now: bool = False) -> None:
        """``frame`` is called under the lock, in the order of the frames. Blocks while the runner can't keep up."""
        if self._forked:
            if not self._warned:
                logger.warning("what a process that the agent has forked emits or saves is not recorded")
                self._warned = True
            return
        with self._lock:
            was_empty = not self._buffer
            self._buffer += frame()
            if now or len(self._buffer) >= FLUSH_BYTES:
                self._flush()
            elif was_empty:
                self._filled.set()

    def _close_in_fork(self) -> None:
        """A process that the agent forks must not write to the runner."""
        self._forked = True
        self._socket.close()

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        try:
            self._socket.sendall(data)
        except OSError:
            _end_with_runner()

    def _flush_regularly(self) -> None:
        while True:
            self._filled.wait()
            time.sleep(FLUSH_S)
            self._filled.clear()
            self.flush()


class AttemptSender:
    """Sends what one attempt records, and how it ends."""

    def __init__(self, number: int, channel: Channel) -> None:
        self._number = number
        self._channel = channel
        self._spans = 0
        self._contents: set[str] = set()  # digests of those that were handed over

    def emit(self, span: Span) -> None:
        contents: Mapping[str, bytes] = {}
        try:
            data = codec.encode(span)
            if len(data) > blobs.LIMIT:
                span, contents = blobs.kept_apart(span)
                data = codec.encode(span)
        except CodecError as error:
            reason = str(error).encode("utf-8", "backslashreplace")
            self._channel.send(lambda: pack(Kind.SPAN_REFUSED, self._number, reason))
            return

        def frame() -> bytes:
            self._spans += 1
            if not contents:
                return pack(SPAN, self._number, span.kind.encode(), data)
            head = " ".join([span.kind, *contents]).encode()
            new = [(digest, content) for digest, content in contents.items() if digest not in self._contents]
            self._contents.update(contents)
            before = b"".join([pack(Kind.BLOB, self._number, digest.encode(), content) for digest, content in new])
            return before + pack(SPAN, self._number, head, data)

        self._channel.send(frame)

    def save(self, state: bytes) -> None:
        self._channel.send(lambda: pack(Kind.STATE, self._number, body=state), now=True)

    def calling(self, calling: bool) -> None:
        self._channel.send(lambda: pack(Kind.CALLING, self._number, b"1" * calling))

    def end(self, outcome: Outcome) -> None:
        def frame() -> bytes:
            described = json.dumps(asdict(outcome) | {"spans": self._spans}).encode()
            if len(described) > MAX_BYTES:
                message = f"what the agent returned or raised takes {len(described):,} bytes, of at most {MAX_BYTES:,}"
                failed = stopped_by(status.FAILED, "too_large", message)
                described = json.dumps(asdict(failed) | {"spans": self._spans}).encode()
            return pack(Kind.ENDED, self._number, described)

        self._channel.send(frame, now=True)


class AgentProcess:
    """Handles the runner's frames, on the event loop."""

    attempts: AttemptRunner  # set once the agent is imported, before the first task comes

    def __init__(self, channel: Channel, config: AgentConfig) -> None:
        self._channel = channel
        self._config = config
        self._ids: dict[int, str] = {}
        self.stopped = False  # by the runner

    def handle(self, frames: list[Frame]) -> None:
        for frame in frames:
            if frame.kind is Kind.TASK:
                self._start(frame)
            elif frame.kind is Kind.CANCEL:
                self.attempts.cancel(self._ids.get(frame.number, ""))
            elif frame.kind is Kind.STOP:
                self.stopped = True
                asyncio.get_running_loop().stop()

    def _start(self, frame: Frame) -> None:
        head = json.loads(frame.head)
        task = codec.decode_as(RolloutTask, frame.body[: head["task_bytes"]])
        running = AttemptSender(frame.number, self._channel)
        attempt = AttemptContext(
            task,
            head["attempt_id"],
            running.emit,
            running.save,
            resources=_resources(frame.body[head["task_bytes"] :]).items,
            on_calling=running.calling,
            proxy_url=head["proxy_url"],
            proxy_key=head["proxy_key"],
            gateway_url=self._config.gateway_url,
        )
        self._ids[frame.number] = attempt.attempt_id

        def on_end(outcome: Outcome) -> None:
            self._ids.pop(frame.number, None)
            with suppress(OSError):
                os.chdir(self._config.folder)  # the agent may have changed it
            running.end(outcome)

        self._channel.send(lambda: pack(Kind.STARTED, frame.number))
        self.attempts.start(attempt, on_end)


@lru_cache(maxsize=4)
def _resources(control: bytes) -> Resources:
    return Resources.from_control(codec.decode_as(Control, control))


def _receive(connection: socket.socket, reader: FrameReader) -> Iterator[list[Frame]]:
    while True:
        try:
            data = connection.recv(RECEIVE_BYTES)
        except OSError:
            return
        if not data:
            return
        if frames := list(reader.feed(data)):
            yield frames


def _share_metrics(place: str) -> None:
    """Lets the runner read the metrics of hooks. The default names files by process id: recycled processes would leave
    more and more of them."""
    from prometheus_client import values  # slow to import, and only hooks need it

    pid = os.getpid()
    values.ValueClass = values.MultiProcessValue(  # type: ignore[no-untyped-call]
        lambda: place if os.getpid() == pid else f"{place}-{os.getpid()}"
    )


def _here() -> dict[str, str]:
    attempt = current_attempt()
    return {} if attempt is None else rollout_fields(attempt.task.rollout_id, attempt.attempt_id)


def main() -> None:
    with supervised(_end_after_failure):
        _run()


def _run_loop(agent: AgentProcess, loop: asyncio.AbstractEventLoop) -> None:
    """Runs the loop until the runner asks this process to stop."""
    run_forever(loop)
    if not agent.stopped:
        raise RuntimeError("an agent has stopped the event loop that all async agents of this process share")


def _run_on_main_thread(agent: AgentProcess, loop: asyncio.AbstractEventLoop) -> None:
    """Runs sync attempts here, where signals work, and the loop in a thread."""
    works: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    agent.attempts.run_sync = lambda work, name: works.put(work)

    def run() -> None:
        _run_loop(agent, loop)
        works.put(None)

    asyncio.set_event_loop(None)  # that of the other thread is no use to the agent
    thread = supervisor().thread("millstream-loop", run)
    while (work := works.get()) is not None:
        work()
    thread.join()


def _run() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    received = _receive(connection, FrameReader())
    first = next(received)[0]
    place, config = first.head.decode(), AgentConfig(**json.loads(first.body))
    # For our own loggers alone: the agent may set up its logging. What that writes to `sys.stderr` is printed text.
    ours = logging.getLogger("millstream")
    ours.propagate = False
    write_logs(config.log_level, config.log_format, "agent", ours, _here, sys.__stderr__)
    keep_printed(Printed("", ""))
    channel = Channel(connection)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        agent = AgentProcess(channel, config)

        def listen() -> None:
            for frames in received:
                loop.call_soon_threadsafe(agent.handle, frames)
            _end_with_runner()

        supervisor().thread("millstream-receive", listen)
        if config.hooks:
            _share_metrics(place)
        try:
            agent.attempts = open_agent(config, loop)
        except ConfigError as error:
            reason = str(error).encode("utf-8", "backslashreplace")
            channel.send(lambda: pack(Kind.REFUSED, head=reason), now=True)
            return
        channel.send(lambda: pack(Kind.READY), now=True)
        pid = os.getpid()
        os.register_at_fork(after_in_child=loop.stop)  # a fork's loop would take wake-ups from this loop
        try:
            if config.one_at_a_time and not agent.attempts.is_async:
                _run_on_main_thread(agent, loop)
            else:
                if not agent.attempts.is_async:
                    name_signals_in_threads()
                _run_loop(agent, loop)
        finally:
            if os.getpid() != pid:
                os._exit(1)
        channel.flush()


if __name__ == "__main__":
    main()
