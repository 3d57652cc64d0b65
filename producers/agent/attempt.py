"""Finds the attempt that the running code belongs to. OpenTelemetry's context carries it through tasks,
``to_thread``, threads and executors (with the threading instrumentation). Several attempts can share the process."""

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

from millstream.producers.printed import Printed
from millstream.schemas.attempt_keys import attempt_path
from millstream.schemas.control import Resource
from millstream.schemas.wire.records import RolloutTask, Span

_KEY = otel.create_key("millstream.attempt")


@dataclass(frozen=True, slots=True)
class RolloutInfo:
    """Describes its rollout to an agent that has a ``rollout`` parameter."""

    rollout_id: str
    attempt_id: str
    attempt: int  # 1 for the first
    mode: str  # train, val or test
    input: Any
    metadata: Mapping[str, str]
    seed: int | None = None  # of the task. Nothing is seeded with it but the model's answers


@dataclass(eq=False)
class AttemptContext:
    """One running attempt, as its own code sees it. ``emit`` takes finished spans and ``save`` the state; both may be
    called from any thread."""

    task: RolloutTask
    attempt_id: str
    emit: Callable[[Span], None]
    save: Callable[[bytes], None]
    resources: Mapping[str, Resource] = field(default_factory=dict)
    on_calling: Callable[[bool], None] = lambda calling: None  # gets whether a model call is running
    proxy_url: str = ""  # empty without a proxy
    proxy_key: str = ""  # also for the gateway
    gateway_url: str = ""  # empty without a gateway
    sequence: "count[int]" = field(default_factory=lambda: count(1))
    rewarded: bool = False  # a reward has been emitted
    tracer: Tracer = field(default_factory=NoOpTracer)
    context: Context = field(default_factory=Context)  # of its code, with the root span as the current one
    state: bytes | None = None  # last saved, by this attempt or an earlier one
    threads: set[threading.Thread] = field(default_factory=set)  # started by it, and made calls or spans
    alone: bool = True  # no other attempt has run in this process at the same time
    ended: bool = False

    def __post_init__(self) -> None:
        self.state = self.task.state
        self._calls = 0
        self._calls_lock = threading.Lock()
        self.printed = Printed(self.task.rollout_id, self.attempt_id)

    def watch(self, seen: Callable[[Span], None]) -> None:
        """Calls ``seen`` with each span from now on, before it is emitted."""
        emit = self.emit

        def seen_and_emitted(span: Span) -> None:
            seen(span)
            emit(span)

        self.emit = seen_and_emitted

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Marks the body as a model call."""
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
        """Path prefix of its requests to the proxy."""
        return attempt_path(self.task.rollout_id, self.attempt_id)

    @property
    def base_url(self) -> str:
        """Base URL of its model calls, without /v1. Empty without a proxy."""
        return self.proxy_url and self.proxy_url.rstrip("/") + self.path

    @cached_property
    def rollout(self) -> RolloutInfo:
        task = self.task
        return RolloutInfo(
            task.rollout_id,
            self.attempt_id,
            task.attempt,
            task.mode,
            json.loads(task.input),
            dict(task.metadata),
            task.seed,
        )


def current_attempt(context: Context | None = None) -> AttemptContext | None:
    """The attempt of ``context``, by default of the current context."""
    return cast("AttemptContext | None", otel.get_value(_KEY, context))


def enter(attempt: AttemptContext) -> Token[Context]:
    """Makes the running task or thread part of the attempt, in a new context that holds nothing else."""
    return otel.attach(otel.set_value(_KEY, attempt, Context()))


def leave(token: Token[Context]) -> None:
    otel.detach(token)
