"""Hooks: the user's own code around each attempt, in the agent's process. An error in a hook is logged with the rollout
and never fails the attempt. ``examples/hooks`` has some to copy."""

import asyncio
import inspect
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from millstream.producers.agent.attempt import AttemptContext, RolloutInfo
from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import normalised
from millstream.schemas.wire.records import Span

logger = logging.getLogger(__name__)

RETRY: Final = "retry"
FAIL: Final = "fail"
IGNORE: Final = "ignore"
WISHES: Final = (RETRY, FAIL, IGNORE)


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """Where an attempt runs. The runner itself is another process, unless attempts run in its threads."""

    worker_id: str = ""
    agent: str = ""  # module:attribute
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


class TraceSummary:
    """What the spans of an attempt, made in its own process, come to so far. Spans of the proxy are not among them:
    tokens are counted if the agent's SDK is instrumented."""

    def __init__(self) -> None:
        self.spans = 0
        self.kinds: Counter[str] = Counter()  # llm, tool, reward, … → number of spans
        self.errors = 0  # spans that say they failed
        self.input_tokens = 0
        self.output_tokens = 0
        self.status: str | None = None  # as soon as the agent is done, like the two below
        self.error: BaseException | None = None  # what the agent raised
        self.output: str | None = None  # what it returned, as JSON
        self._began = time.monotonic()
        self._seconds: float | None = None
        self._lock = threading.Lock()

    @property
    def duration_s(self) -> float:
        """How long the agent has run, or ran."""
        return time.monotonic() - self._began if self._seconds is None else self._seconds

    def add(self, span: Span) -> None:
        with self._lock:
            self.spans += 1
            self.kinds[span.kind] += 1
            self.errors += span.status == "Error"
            if span.kind == semconv.LLM:
                attributes = normalised(span).attributes
                self.input_tokens += _number(attributes.get(semconv.INPUT_TOKENS))
                self.output_tokens += _number(attributes.get(semconv.OUTPUT_TOKENS))

    def begin(self) -> None:
        self._began = time.monotonic()

    def end(self) -> None:
        self._seconds = self.duration_s


class Hook:
    """Override what you need, each as ``def`` or ``async def``.

    One instance serves all attempts of its process, several at a time. A ``def`` runs in a thread of its own, an
    ``async def`` on the loop of the agents: it must not block. Several hooks are called one after the other, in the
    order given. A call that takes longer than ``timeout_s`` is given up (a thread goes on unheeded), and the attempt
    goes on. The time that hooks take counts towards the attempt's own time limit.
    """

    timeout_s: float = 10.0

    def __init__(self, *, timeout_s: float | None = None) -> None:
        if timeout_s is not None:
            self.timeout_s = timeout_s

    def on_rollout_start(self, agent: Callable[..., Any], runner: RunnerInfo, rollout: RolloutInfo) -> Any:
        """First of all, outside the attempt's trace."""

    def on_trace_start(
        self, agent: Callable[..., Any], runner: RunnerInfo, tracer: TraceSummary, rollout: RolloutInfo
    ) -> Any:
        """Just before the agent is called. What `emit_span` records here belongs to the attempt."""

    def on_error(
        self, agent: Callable[..., Any], runner: RunnerInfo, rollout: RolloutInfo, error: BaseException
    ) -> Any:
        """The agent raised ``error``. The answer says what becomes of the attempt: "ignore": it succeeds, without
        output; "fail": it fails and is not run again; "retry": it fails and is run again whatever ``retry_on`` says,
        as long as attempts are left; None: as without hooks. The first hook with an answer decides."""

    def on_trace_end(
        self, agent: Callable[..., Any], runner: RunnerInfo, tracer: TraceSummary, rollout: RolloutInfo
    ) -> Any:
        """The agent is done; how, is in ``tracer``. Its spans are complete but for the root span."""

    def on_rollout_end(self, agent: Callable[..., Any], runner: RunnerInfo, rollout: RolloutInfo, status: str) -> Any:
        """Last, before the result is handed over. The runner may know better than ``status``: an attempt that it
        ended, for a time-out say, is "cancelled" here."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """The hooks of a process, in order, and what they are told of it."""

    hooks: Sequence[Hook] = ()
    runner: RunnerInfo = field(default_factory=RunnerInfo)


class HookedAttempt:
    """Calls the hooks around one attempt. ``on_loop``: its coroutines are awaited on ``loop``; if not, they run in a
    thread that may be blocked, and never suspend."""

    def __init__(
        self,
        hooks: Hooks,
        agent: Callable[..., Any],
        attempt: AttemptContext,
        loop: asyncio.AbstractEventLoop,
        on_loop: bool,
    ) -> None:
        self.trace = TraceSummary()
        self._hooks = hooks
        self._agent = agent
        self._attempt = attempt
        self._loop = loop
        self._on_loop = on_loop
        if hooks.hooks:
            attempt.emit = partial(_observed, attempt.emit, self.trace)

    async def rollout_start(self) -> None:
        await self._call("on_rollout_start")

    async def trace_start(self) -> None:
        await self._call("on_trace_start", self.trace, before=True)
        self.trace.begin()

    async def retry_override(self, error: BaseException) -> str | None:
        """What the hooks want to become of an attempt whose agent raised ``error``."""
        for answer in await self._call("on_error", error):
            if answer in WISHES:
                return str(answer)
            if answer is not None:
                logger.error("%s: on_error answered %r, which is none of %s", self._name, answer, ", ".join(WISHES))
        return None

    async def trace_end(self, status: str, output: str | None) -> None:
        self.trace.status, self.trace.output = status, output
        await self._call("on_trace_end", self.trace, before=True)

    async def rollout_end(self, status: str) -> None:
        self.trace.status = status
        await self._call("on_rollout_end", status)
        self.trace.error = None  # its traceback holds the attempt: a circle

    @property
    def _name(self) -> str:
        return f"attempt {self._attempt.attempt_id} of rollout {self._attempt.task.rollout_id}"

    async def _call(self, name: str, *more: Any, before: bool = False) -> list[Any]:
        """The answers of all hooks. ``more``: their arguments besides the rollout, which may come ``before`` it."""
        answers: list[Any] = []
        for hook in self._hooks.hooks:
            if getattr(type(hook), name) is getattr(Hook, name):
                continue  # it has nothing to say here
            if os.getpid() != self._hooks.runner.pid:
                break  # a fork that the agent has made is not the attempt
            try:
                rollout = (self._attempt.rollout,)
                arguments = more + rollout if before else rollout + more
                call = partial(getattr(hook, name), self._agent, self._hooks.runner, *arguments)
                answer, error = await self._limited(call, hook.timeout_s)
            except Exception as problem:
                answer, error = None, problem
            except asyncio.CancelledError:
                if self.trace.status is None and self.trace.error is None:
                    raise
                break  # the agent is done: only the hooks that are left are given up
            if error is not None:
                logger.error("%s: hook %s.%s failed: %r", self._name, type(hook).__name__, name, error, exc_info=error)
            answers.append(answer)
        return answers

    async def _limited(self, call: "partial[Any]", seconds: float) -> tuple[Any, BaseException | None]:
        future = self._start(call)
        try:
            if self._on_loop:
                return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
            return future.result(seconds)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(f"it took longer than its time limit (timeout_s) of {seconds:g} s") from None

    def _start(self, call: "partial[Any]") -> "Future[tuple[Any, BaseException | None]]":
        """Begins a call, in a copy of the current context; the future has its answer, or what it raised."""
        if inspect.iscoroutinefunction(call.func):
            return asyncio.run_coroutine_threadsafe(_awaited(call), self._loop)
        future: Future[tuple[Any, BaseException | None]] = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        thread = partial(copy_context().run, lambda: future.set_result(_called(call)))
        threading.Thread(target=thread, name="millstream-hook", daemon=True).start()
        return future


async def _awaited(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return await call(), None
    except BaseException as error:  # SystemExit, too: it would end the loop
        return None, error


def _called(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        answer = call()
        if inspect.iscoroutine(answer):  # a sync wrapper around an async method
            answer = asyncio.run(answer)
    except BaseException as error:
        return None, error
    return answer, None


def _observed(emit: Callable[[Span], None], trace: TraceSummary, span: Span) -> None:
    trace.add(span)
    emit(span)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
