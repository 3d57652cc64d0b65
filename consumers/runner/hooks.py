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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from millstream.consumers.runner.outcome import Outcome
from millstream.producers.agent.attempt import AttemptContext, RolloutInfo
from millstream.producers.log_lines import rollout_fields
from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import normalised
from millstream.schemas.wire import status
from millstream.schemas.wire.records import Span

logger = logging.getLogger(__name__)

RETRY: Final = "retry"
FAIL: Final = "fail"
IGNORE: Final = "ignore"
ON_ERROR: Final = (RETRY, FAIL, IGNORE)


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """Where an attempt runs. The runner itself is another process, unless attempts run in its threads."""

    worker_id: str = ""
    agent: str = ""  # module:attribute
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


class TraceSummary:
    """Totals of the spans that an attempt has made in its own process so far. The proxy's spans are not among them:
    tokens are counted if the agent's SDK is instrumented."""

    def __init__(self) -> None:
        self.spans = 0
        self.kinds: Counter[str] = Counter()  # llm, tool, reward, … → number of spans
        self.errors = 0  # spans with an error
        self.input_tokens = 0
        self.output_tokens = 0
        self.status: str | None = None  # set when the agent is done, like the two below
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

    def end(self, outcome: Outcome) -> None:
        self._seconds, self.status, self.output = self.duration_s, outcome.status, outcome.output


class Hook:
    """Override what you need, each method as ``def`` or ``async def``.

    One instance serves all attempts of its process, several at a time. A ``def`` runs in a thread of its own, an
    ``async def`` on the event loop of the agents, where it must not block. Several hooks are called one after the
    other, in the order given. A call that takes longer than ``timeout_s`` is abandoned (its thread goes on), and the
    attempt continues. The time that hooks take counts towards the attempt's time limit.
    """

    timeout_s: float = 10.0

    def __init__(self, *, timeout_s: float | None = None) -> None:
        if timeout_s is not None:
            self.timeout_s = timeout_s

    def on_rollout_start(self, agent: Callable[..., Any], runner: RunnerInfo, rollout: RolloutInfo) -> Any:
        """Called first, outside the attempt's trace."""

    def on_trace_start(
        self, agent: Callable[..., Any], runner: RunnerInfo, tracer: TraceSummary, rollout: RolloutInfo
    ) -> Any:
        """Called just before the agent. Spans that are emitted here belong to the attempt."""

    def on_error(
        self, agent: Callable[..., Any], runner: RunnerInfo, rollout: RolloutInfo, error: BaseException
    ) -> Any:
        """The agent raised ``error``. Return "ignore": the attempt succeeds, without output; "fail": it fails and is
        not retried; "retry": it fails and is retried whatever ``retry_on`` says, while attempts are left; or None: as
        without hooks. The first hook that returns one of these decides."""

    def on_trace_end(
        self, agent: Callable[..., Any], runner: RunnerInfo, tracer: TraceSummary, rollout: RolloutInfo
    ) -> Any:
        """The agent has ended; ``tracer`` says how. Its spans are complete but for the root span."""

    def on_rollout_end(self, agent: Callable[..., Any], runner: RunnerInfo, rollout: RolloutInfo, status: str) -> Any:
        """Called last, before the result is handed over. An attempt that the runner ended, for example after a
        time-out, has the ``status`` "cancelled" here."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """The hooks of a process, in order, and the runner's description, which they are given."""

    hooks: Sequence[Hook] = ()
    runner: RunnerInfo = field(default_factory=RunnerInfo)


class HookedAttempt:
    """Calls the hooks around one attempt. ``loop``: the loop that coroutines run on."""

    def __init__(
        self, hooks: Hooks, agent: Callable[..., Any], attempt: AttemptContext, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.trace = TraceSummary()
        self._hooks = hooks
        self._agent = agent
        self._attempt = attempt
        self._loop = loop
        if hooks.hooks:
            attempt.watch(self.trace.add)

    def call_blocking(self, name: str, *arguments: Any) -> list[Any]:
        """As `call`, from a thread other than the loop's."""
        if not self._hooks.hooks or self._forked or self._loop.is_closed():
            return []
        return asyncio.run_coroutine_threadsafe(self.call(name, *arguments), self._loop).result()

    async def call(self, name: str, *arguments: Any) -> list[Any]:
        """Calls the method ``name`` of all hooks, on the loop. Returns their answers."""
        answers: list[Any] = []
        for hook in self._hooks.hooks:
            if getattr(type(hook), name) is getattr(Hook, name):
                continue  # not overridden
            if self._forked:
                break
            try:
                call = partial(getattr(hook, name), self._agent, self._hooks.runner, *arguments)
                answer, error = await self._limited(call, hook.timeout_s)
            except Exception as problem:
                answer, error = None, problem
            except asyncio.CancelledError:
                if self.trace.status is None and self.trace.error is None:
                    raise
                break  # the agent is done: only the remaining hooks are skipped
            if error is not None:
                said = (type(hook).__name__, name, error)
                logger.error("hook %s.%s failed: %r", *said, exc_info=error, extra=self._fields)
            answers.append(answer)
        return answers

    def decided(self, outcome: Outcome, answers: Sequence[Any]) -> Outcome:
        """The outcome of an attempt whose agent raised, after the hooks' answers to ``on_error``."""
        for answer in answers:
            if answer == IGNORE and outcome.error is not None:
                error = f"{outcome.error.type}: {outcome.error.message}"
                return Outcome(status.SUCCEEDED, metadata={"ignored": error})
            if answer in ON_ERROR:
                return replace(outcome, metadata={"retry": "yes" if answer == RETRY else "no"})
            if answer is not None:
                words = ", ".join(ON_ERROR)
                logger.error("on_error returned %r, which is none of %s", answer, words, extra=self._fields)
        return outcome

    @property
    def _forked(self) -> bool:
        """In a process that the agent has forked: that is not the attempt."""
        return os.getpid() != self._hooks.runner.pid

    @property
    def _fields(self) -> dict[str, str]:
        return rollout_fields(self._attempt.task.rollout_id, self._attempt.attempt_id)

    async def _limited(self, call: "partial[Any]", seconds: float) -> tuple[Any, BaseException | None]:
        future = self._start(call)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except TimeoutError:
            raise TimeoutError(f"it took longer than its time limit (timeout_s) of {seconds:g} s") from None

    def _start(self, call: "partial[Any]") -> "Future[tuple[Any, BaseException | None]]":
        """Begins a call, in a copy of the current context. The future holds its answer, or what it raised."""
        if inspect.iscoroutinefunction(call.func):
            return asyncio.run_coroutine_threadsafe(_awaited(call), self._loop)
        future: Future[tuple[Any, BaseException | None]] = Future()
        future.set_running_or_notify_cancel()  # a thread can't be cancelled
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


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
