"""Runs attempts: calls the user's agent, traced, many at a time, and says how each one ended.

The same code runs in an agent process and in a thread of the runner (`agent_hosts`).
"""

import asyncio
import importlib
import inspect
import json
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from typing import Any

from millstream.producers.attempt_context import Attempt
from millstream.producers.emit import emit_reward
from millstream.producers.span_processor import utf8
from millstream.producers.tracer import Tracer
from millstream.schemas import status
from millstream.schemas.errors import ConfigError
from millstream.schemas.records import ErrorInfo

AgentFunction = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. ``spans``: how many its side has handed over; None if nobody could count them."""

    status: str
    error: ErrorInfo | None = None
    output: str | None = None
    spans: int | None = None


def stopped_by(how: str, cause: str, message: str) -> Outcome:
    """The outcome of an attempt that something else than the agent's own code has ended."""
    return Outcome(how, ErrorInfo(type=cause, message=message, stack=""))


def load_agent(path: str, folder: str) -> AgentFunction:
    """The callable at ``module:attribute``, with ``folder`` first on the import path.

    Raises `ConfigError` naming the path and what went wrong.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"agent {path!r} is not of the form module:attribute, like examples.calculator.agent:agent")
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except BaseException as error:  # SystemExit too: the user's module may do anything
        cause = "".join(traceback.format_exception(error)).rstrip()
        raise ConfigError(
            f"agent {path!r} can't be imported from {folder}: {type(error).__name__}: {_message(error)}\n{cause}"
        ) from error
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise ConfigError(f"agent {path!r}: {module_name} has no {attribute}") from None
    if not callable(found):
        raise ConfigError(f"agent {path!r} is not callable: it is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def agent_name(agent: str | AgentFunction) -> str:
    """What spans call the agent: ``module:attribute``."""
    if isinstance(agent, str):
        return agent
    named = agent if hasattr(agent, "__qualname__") else type(agent)
    return f"{named.__module__}:{named.__qualname__}"


class AttemptRunner:
    """Runs attempts at one agent: an async agent as tasks of ``loop``, a sync one in a thread for each attempt.

    A new thread each time: a thread that is used again may carry what the last attempt left in it.
    """

    def __init__(self, agent: AgentFunction, tracer: Tracer, loop: asyncio.AbstractEventLoop) -> None:
        self._agent = agent
        self._tracer = tracer
        self._loop = loop
        self._is_async = _is_async(agent)
        self._optional = _optional_parameters(agent)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, attempt: Attempt, on_end: Callable[[Outcome], None]) -> None:
        """Begins an attempt; call it on the loop's thread. ``on_end`` is called on whichever thread it ended."""
        if self._is_async:
            task = self._loop.create_task(self._run_async(attempt, on_end))
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

    async def _run_async(self, attempt: Attempt, on_end: Callable[[Outcome], None]) -> None:
        try:
            with self._tracer.attempt(attempt):
                result = await self._agent(attempt.rollout.input, **self._arguments(attempt))
                outcome = _returned(attempt, result)
        except asyncio.CancelledError as error:
            outcome = _raised(error, status.CANCELLED)
        except BaseException as error:  # an agent's sys.exit() ends its attempt, not everybody's
            outcome = _raised(error)
        on_end(outcome)

    def _run_sync(self, attempt: Attempt, on_end: Callable[[Outcome], None]) -> None:
        try:
            with self._tracer.attempt(attempt):
                result = self._agent(attempt.rollout.input, **self._arguments(attempt))
                if inspect.iscoroutine(result):  # a sync wrapper around an async agent
                    result = asyncio.run(result)
                outcome = _returned(attempt, result)
        except BaseException as error:
            outcome = _raised(error)
        on_end(outcome)

    def _arguments(self, attempt: Attempt) -> dict[str, Any]:
        return {name: getattr(attempt, name) for name in self._optional}


def _is_async(agent: AgentFunction) -> bool:
    inner = agent
    while isinstance(inner, partial):
        inner = inner.func
    inner = inspect.unwrap(inner)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def _optional_parameters(agent: AgentFunction) -> tuple[str, ...]:
    """Which of ``resources`` and ``rollout`` the agent has a parameter for, behind its input."""
    try:
        parameters = list(inspect.signature(agent).parameters.values())
    except (TypeError, ValueError):  # some callables written in C
        return ()
    by_name = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    by_name |= {p.name for p in parameters[1:] if p.kind is p.POSITIONAL_OR_KEYWORD}
    return tuple(name for name in ("resources", "rollout") if name in by_name)


def _returned(attempt: Attempt, result: Any) -> Outcome:
    """Within the attempt: a number that the agent returns is its reward, unless it has emitted some."""
    if inspect.isgenerator(result) or inspect.isasyncgen(result) or inspect.isawaitable(result):
        raise TypeError(f"the agent returned {result!r}, which nobody runs; it has to return its result")
    if isinstance(result, int | float) and not isinstance(result, bool) and not attempt.rewarded:
        emit_reward(result)
    return Outcome(status.SUCCEEDED, output=None if result is None else _as_json(result))


def _raised(error: BaseException, how: str = status.FAILED) -> Outcome:
    stack = "".join(traceback.format_exception(error))
    return Outcome(how, ErrorInfo(type=type(error).__name__, message=_message(error), stack=utf8(stack)))


def _message(error: BaseException) -> str:
    try:
        return utf8(str(error))
    except Exception:  # an exception class of the agent's own
        return "(its message can't be shown)"


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
