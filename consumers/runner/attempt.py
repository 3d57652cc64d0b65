"""Runs attempts: calls the user's agent, traced, many at a time, and says how each one ended.

The same code runs in an agent process and in a thread of the runner (`agent_hosts`).
"""

import asyncio
import inspect
import json
import logging
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from typing import Any

from millstream.consumers.runner.hooks import IGNORE, RETRY, Hook, HookedAttempt, Hooks, RunnerInfo
from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.emit import emit_reward
from millstream.producers.agent.instrumentation import FRAMEWORKS
from millstream.producers.agent.process_tracer import ProcessTracer, adopt_global_provider
from millstream.schemas.errors import ConfigError
from millstream.schemas.import_path import error_message, load_object
from millstream.schemas.spans.text import utf8
from millstream.schemas.wire import status
from millstream.schemas.wire.records import ErrorInfo

logger = logging.getLogger(__name__)

AgentFunction = Callable[..., Any]
AGENT_PARAMETERS = ("resources", "rollout")  # that an agent may have behind its input


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What whoever runs an agent has to know of it; JSON, unless the agent or a hook is an object."""

    agent: str | AgentFunction  # module:attribute, or the callable
    folder: str  # where modules are looked for first
    worker_id: str
    proxy_urls: Sequence[str] = ()
    gateway_url: str = ""
    hooks: Sequence[Hook | str] = ()
    instrument: Sequence[str] = tuple(FRAMEWORKS)  # their names

    @property
    def name(self) -> str:
        return agent_name(self.agent)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. ``spans``: how many its side has handed over; None if nobody could count them.

    ``metadata`` goes into the terminal event: ``retry`` ("yes" or "no": what a hook wants, whatever the task's
    ``retry_on`` says), ``ignored`` (the error that a hook made a success of).
    """

    status: str
    error: ErrorInfo | None = None
    output: str | None = None
    spans: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def stopped_by(how: str, cause: str, message: str) -> Outcome:
    """The outcome of an attempt that something else than the agent's own code has ended."""
    return Outcome(how, ErrorInfo(type=cause, message=message, stack=""))


def load_agent(path: str, folder: str) -> AgentFunction:
    """The callable at ``module:attribute``, with ``folder`` first on the import path.

    Raises `ConfigError` naming the path and what went wrong.
    """
    found = load_object("agent", path, folder)
    if not callable(found):
        raise ConfigError(f"agent {path!r} is not callable: it is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def load_hooks(hooks: Sequence[Hook | str], folder: str) -> list[Hook]:
    """The hooks, of which some are named ``module:attribute``: an instance, a class, or what makes one.

    Raises `ConfigError` naming the path and what went wrong.
    """
    return [_load_hook(hook, folder) if isinstance(hook, str) else hook for hook in hooks]


def _load_hook(path: str, folder: str) -> Hook:
    found = load_object("hook", path, folder)
    if not isinstance(found, Hook) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise ConfigError(f"hook {path!r} can't be made: {type(error).__name__}: {error_message(error)}") from error
    if not isinstance(found, Hook):
        raise ConfigError(f"hook {path!r} is no millstream.Hook: it is a {type(found).__name__}")
    return found


def agent_name(agent: str | AgentFunction) -> str:
    """What spans call the agent: ``module:attribute``."""
    if isinstance(agent, str):
        return agent
    agent = inspect.unwrap(agent)
    named = agent if hasattr(agent, "__qualname__") else type(agent)
    return f"{named.__module__}:{named.__qualname__}"


def open_agent(config: AgentConfig, loop: asyncio.AbstractEventLoop) -> "AttemptRunner":
    """Imports the agent into this process, traced, with its hooks. Raises `ConfigError` if that can't be done."""
    tracer = ProcessTracer(config.name, config.proxy_urls, config.instrument)
    agent = load_agent(config.agent, config.folder) if isinstance(config.agent, str) else config.agent
    hooks = Hooks(load_hooks(config.hooks, config.folder), RunnerInfo(config.worker_id, config.name))
    adopt_global_provider()
    return AttemptRunner(agent, tracer, loop, hooks)


class AttemptRunner:
    """Runs attempts at one agent: an async agent as tasks of ``loop``, a sync one in a thread for each attempt.

    A new thread each time: a thread that is used again may carry what the last attempt left in it.
    """

    def __init__(
        self, agent: AgentFunction, tracer: ProcessTracer, loop: asyncio.AbstractEventLoop, hooks: Hooks
    ) -> None:
        self._agent = agent
        self._tracer = tracer
        self._loop = loop
        self._hooks = hooks
        self._is_async = _is_async(agent)
        self._optional = optional_parameters(agent, AGENT_PARAMETERS)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pid = os.getpid()

    def start(self, attempt: AttemptContext, on_end: Callable[[Outcome], None]) -> None:
        """Begins an attempt; call it on the loop's thread. ``on_end`` is called on whichever thread it ended."""
        if self._is_async:
            task = self._loop.create_task(self._run(attempt, on_end))
            self._tasks[attempt.attempt_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(attempt.attempt_id, None))
        else:
            name = f"attempt-{attempt.attempt_id}"
            threading.Thread(target=self._run_sync, args=(attempt, on_end), name=name, daemon=True).start()

    def cancel(self, attempt_id: str) -> None:
        """Asks an async attempt to end; it then ends as `status.CANCELLED`. A sync one can't be asked."""
        task = self._tasks.get(attempt_id)
        if task is not None:
            task.cancel()

    def _run_sync(self, attempt: AttemptContext, on_end: Callable[[Outcome], None]) -> None:
        """In a thread of its own, where nothing suspends: the coroutine runs through in one go."""
        with suppress(StopIteration):
            self._run(attempt, on_end).send(None)

    async def _run(self, attempt: AttemptContext, on_end: Callable[[Outcome], None]) -> None:
        hooks = HookedAttempt(self._hooks, self._agent, attempt, self._loop, self._is_async)
        try:
            await hooks.rollout_start()
            with self._tracer.attempt(attempt):
                try:
                    await hooks.trace_start()
                    # Here and not in a coroutine of its own, which would change a StopIteration.
                    result = self._agent(attempt.rollout.input, **self._arguments(attempt))
                    if self._is_async:
                        result = await result
                    elif inspect.iscoroutine(result):  # a sync wrapper around an async agent
                        result = asyncio.run(result)
                    outcome = returned(attempt, result)
                except BaseException as error:  # an agent's sys.exit() ends its attempt, not everybody's
                    outcome = await self._judged(error, hooks)
                    raise
                finally:
                    hooks.trace.end()
                    await hooks.trace_end(outcome.status, outcome.output)
        except BaseException as error:
            if error is not hooks.trace.error:
                outcome = raised(error, cancellable=self._is_async)
        await hooks.rollout_end(outcome.status)
        if os.getpid() != self._pid:
            logger.warning("a process that the agent forked came back from it (%s) and ends here", outcome.status)
            os._exit(1)  # the attempt goes on in the process that forked it
        on_end(outcome)

    async def _judged(self, error: BaseException, hooks: HookedAttempt) -> Outcome:
        hooks.trace.error = error
        outcome = raised(error, cancellable=self._is_async)
        if outcome.status != status.FAILED or (retry_override := await hooks.retry_override(error)) is None:
            return outcome
        if retry_override == IGNORE:
            return Outcome(status.SUCCEEDED, metadata={"ignored": f"{type(error).__name__}: {error_message(error)}"})
        return replace(outcome, metadata={"retry": "yes" if retry_override == RETRY else "no"})

    def _arguments(self, attempt: AttemptContext) -> dict[str, Any]:
        return {name: getattr(attempt, name) for name in self._optional}


def _is_async(agent: AgentFunction) -> bool:
    inner = agent
    while isinstance(inner, partial):
        inner = inner.func
    inner = inspect.unwrap(inner)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def optional_parameters(function: Callable[..., Any], names: Sequence[str]) -> tuple[str, ...]:
    """Which of ``names`` the function has a parameter for, behind its first one."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C
        return ()
    by_name = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    by_name |= {p.name for p in parameters[1:] if p.kind is p.POSITIONAL_OR_KEYWORD}
    return tuple(name for name in names if name in by_name)


def raised(error: BaseException, *, cancellable: bool) -> Outcome:
    """``cancellable``: an async agent, for which a CancelledError means that it was asked to end."""
    cancelled = cancellable and isinstance(error, asyncio.CancelledError)
    stack = utf8("".join(traceback.format_exception(error)))
    info = ErrorInfo(type=type(error).__name__, message=error_message(error), stack=stack)
    return Outcome(status.CANCELLED if cancelled else status.FAILED, info)


def returned(attempt: AttemptContext, result: Any) -> Outcome:
    """Within the attempt: a number that the agent returns is its reward, unless it has emitted some."""
    if inspect.isgenerator(result) or inspect.isasyncgen(result) or inspect.isawaitable(result):
        raise TypeError(f"the agent returned {result!r}, which nobody runs; it has to return its result")
    if isinstance(result, int | float) and not isinstance(result, bool) and not attempt.rewarded:
        emit_reward(result)
    return Outcome(status.SUCCEEDED, output=None if result is None else _as_json(result))


def _as_json(value: Any) -> str:
    try:
        return utf8(json.dumps(value, ensure_ascii=False, default=_plain))
    except (TypeError, ValueError):  # keys that JSON can't have, or a circle
        return utf8(json.dumps(repr(value), ensure_ascii=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    return str(value)
