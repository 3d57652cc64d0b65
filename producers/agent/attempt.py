"""Which attempt the running code belongs to. It travels in OpenTelemetry's context: through tasks, ``to_thread``,
threads and executors (with the threading instrumentation), however many attempts share the process."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Token
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, cast

from opentelemetry import context as otel
from opentelemetry.context import Context
from opentelemetry.trace import NoOpTracer, Tracer

from millstream.schemas.attempt_keys import attempt_path
from millstream.schemas.control import Resource
from millstream.schemas.wire.records import RolloutTask, Span

_KEY = otel.create_key("millstream.attempt")


@dataclass(frozen=True, slots=True)
class RolloutInfo:
    """What an agent is told about its rollout if it asks for a ``rollout``."""

    rollout_id: str
    attempt_id: str
    attempt: int  # 1 for the first
    mode: str  # train, val or test
    input: Any
    metadata: Mapping[str, str]


@dataclass(eq=False)
class AttemptContext:
    """One running attempt, as its own code sees it. ``emit`` takes its finished spans and ``save`` its state, from any
    thread."""

    task: RolloutTask
    attempt_id: str
    emit: Callable[[Span], None]
    save: Callable[[bytes], None]
    resources: Mapping[str, Resource] = field(default_factory=dict)
    on_calling: Callable[[bool], None] = lambda calling: None  # told when a model is being called, and when none is
    proxy_url: str = ""  # empty: there is no proxy
    proxy_key: str = ""  # the gateway takes it, too
    gateway_url: str = ""  # empty: spans can't be sent there
    sequence: "count[int]" = field(default_factory=lambda: count(1))
    rewarded: bool = False  # a reward has been emitted
    tracer: Tracer = field(default_factory=NoOpTracer)
    context: Context = field(default_factory=Context)  # that of its code: below its root span
    state: bytes | None = None  # the last one saved, by this attempt or the one before it
    threads: set[threading.Thread] = field(default_factory=set)  # those it started that have made calls or spans
    alone: bool = True  # no other attempt has run in this process at the same time
    ended: bool = False

    def __post_init__(self) -> None:
        self.state = self.task.state
        self._calls = 0
        self._calls_lock = threading.Lock()

    @contextmanager
    def calling(self) -> Iterator[None]:
        """The body is a model call."""
        self._count_call(1)
        try:
            yield
        finally:
            self._count_call(-1)

    def _count_call(self, more: int) -> None:
        with self._calls_lock:
            before, self._calls = self._calls, self._calls + more
            if not before or not self._calls:
                self.on_calling(self._calls > 0)

    @cached_property
    def path(self) -> str:
        """Prefix of its paths at the proxy."""
        return attempt_path(self.task.rollout_id, self.attempt_id)

    @property
    def base_url(self) -> str:
        """Where its model calls go, without /v1; empty if there is no proxy."""
        return self.proxy_url and self.proxy_url.rstrip("/") + self.path

    @cached_property
    def rollout(self) -> RolloutInfo:
        task = self.task
        return RolloutInfo(
            task.rollout_id, self.attempt_id, task.attempt, task.mode, json.loads(task.input), dict(task.metadata)
        )


def current_attempt(context: Context | None = None) -> AttemptContext | None:
    """The attempt that ``context`` (the current one) belongs to."""
    return cast("AttemptContext | None", otel.get_value(_KEY, context))


def enter(attempt: AttemptContext) -> Token[Context]:
    """Makes the running task or thread part of the attempt, in a context that has nothing else in it."""
    return otel.attach(otel.set_value(_KEY, attempt, Context()))


def leave(token: Token[Context]) -> None:
    otel.detach(token)
