"""An agent process: ``python -P -m millstream.consumers.runner.agent_process FD``, started by a runner (`agent_hosts`).

Holds the agent and runs attempts at it; has no access to the log. It gets tasks and gives spans over the socket FD
(`frames`). When the socket ends, so does the process: it never outlives its runner.
"""

import asyncio
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

from millstream.consumers.runner.attempt import AgentConfig, AttemptRunner, Outcome, open_agent
from millstream.consumers.runner.frames import Frame, FrameReader, Kind, pack
from millstream.producers.agent.attempt import AttemptContext
from millstream.schemas.control import Resources
from millstream.schemas.errors import CodecError, ConfigError
from millstream.schemas.spans import blobs
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import Control, RolloutTask, Span

logger = logging.getLogger(__name__)

FLUSH_S = 0.02  # spans wait this long for others, unless their attempt ends
FLUSH_BYTES = 64 << 10
RECEIVE_BYTES = 256 << 10
SPAN = Kind.SPAN  # looking up an Enum's member takes its time


def _end() -> None:
    """The runner is gone: so are we, and whatever the agent has started (this process leads a group of its own)."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


class _Channel:
    """The way out. Spans gather for a moment: a system call for each would wake the runner each time."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._lock = threading.Lock()
        self._filled = threading.Event()
        self._forked = False
        self._said_so = False
        os.register_at_fork(after_in_child=self._hush)
        threading.Thread(target=self._flush_regularly, name="millstream-flush", daemon=True).start()

    def send(self, frame: Callable[[], bytes], *, now: bool = False) -> None:
        """``frame`` is called when it is this frame's turn. Waits while the runner can't keep up."""
        if self._forked:
            if not self._said_so:
                logger.warning("what a process that the agent has forked emits or saves is not recorded")
                self._said_so = True
            return
        with self._lock:
            was_empty = not self._buffer
            self._buffer += frame()
            if now or len(self._buffer) >= FLUSH_BYTES:
                self._flush()
            elif was_empty:
                self._filled.set()

    def _hush(self) -> None:
        """A process that the agent forks must not talk in between."""
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
            _end()

    def _flush_regularly(self) -> None:
        while True:
            self._filled.wait()
            time.sleep(FLUSH_S)
            self._filled.clear()
            self.flush()


class _Running:
    """An attempt in this process: sends what becomes of it."""

    def __init__(self, number: int, channel: _Channel) -> None:
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
            described = asdict(outcome) | {"spans": self._spans}
            return pack(Kind.ENDED, self._number, json.dumps(described).encode())

        self._channel.send(frame, now=True)


class _Agent:
    """Handles what the runner says; on the event loop."""

    attempts: AttemptRunner  # as soon as the agent is imported, which is before any task comes

    def __init__(self, channel: _Channel, config: AgentConfig) -> None:
        self._channel = channel
        self._config = config
        self._ids: dict[int, str] = {}
        self._stop = asyncio.Event()

    async def stopped(self) -> None:
        await self._stop.wait()

    def handle(self, frames: list[Frame]) -> None:
        for frame in frames:
            if frame.kind is Kind.TASK:
                self._start(frame)
            elif frame.kind is Kind.CANCEL:
                self.attempts.cancel(self._ids.get(frame.number, ""))
            elif frame.kind is Kind.STOP:
                self._stop.set()

    def _start(self, frame: Frame) -> None:
        head = json.loads(frame.head)
        task = codec.decode_as(RolloutTask, frame.body[: head["task_bytes"]])
        running = _Running(frame.number, self._channel)
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
                os.chdir(self._config.folder)  # the agent may have gone elsewhere; the next one begins at home
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
    """Lets the runner read what hooks count. By default files are named by process id: one that is recycled often
    would leave more and more of them."""
    from prometheus_client import values  # takes a while, and only hooks need it

    pid = os.getpid()
    values.ValueClass = values.MultiProcessValue(  # type: ignore[no-untyped-call]
        lambda: place if os.getpid() == pid else f"{place}-{os.getpid()}"
    )


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    received = _receive(connection, FrameReader())
    first = next(received)[0]
    place, config = first.head.decode(), AgentConfig(**json.loads(first.body))
    channel = _Channel(connection)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        agent = _Agent(channel, config)

        def listen() -> None:
            for frames in received:
                loop.call_soon_threadsafe(agent.handle, frames)
            _end()

        threading.Thread(target=listen, name="millstream-receive", daemon=True).start()
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
        os.register_at_fork(after_in_child=loop.stop)  # a fork's loop would take wake-ups from this one
        try:
            runner.run(agent.stopped())
        finally:
            if os.getpid() != pid:
                os._exit(1)
        channel.flush()


if __name__ == "__main__":
    main()
