"""How an attempt ended, as its own side sees it: the agent returned, raised, or was stopped."""

import asyncio
import inspect
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.emit import emit_reward
from millstream.schemas.import_path import error_message
from millstream.schemas.spans.text import json_text, safe_repr, utf8
from millstream.schemas.wire import status
from millstream.schemas.wire.records import ErrorInfo


@dataclass(frozen=True, slots=True)
class Outcome:
    """``spans``: how many the agent's side has handed over; None if it could not count them.

    ``metadata`` goes into the terminal event: ``retry`` ("yes" or "no": a hook's decision, whatever the task's
    ``retry_on`` says), ``ignored`` (the error that a hook turned into a success).
    """

    status: str
    error: ErrorInfo | None = None
    output: str | None = None
    spans: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def stopped_by(how: str, cause: str, message: str) -> Outcome:
    """The outcome of an attempt that was ended from outside the agent's code."""
    return Outcome(how, ErrorInfo(type=cause, message=message, stack=""))


def raised(error: BaseException, *, cancellable: bool) -> Outcome:
    """``cancellable``: an async agent, for which a CancelledError means that it was asked to end."""
    cancelled = cancellable and isinstance(error, asyncio.CancelledError)
    stack = utf8("".join(traceback.format_exception(error)))
    info = ErrorInfo(type=type(error).__name__, message=error_message(error), stack=stack)
    return Outcome(status.CANCELLED if cancelled else status.FAILED, info)


def returned(attempt: AttemptContext, result: Any) -> Outcome:
    """Called within the attempt. A number that the agent returns is its reward, unless it has emitted a reward."""
    if inspect.isgenerator(result) or inspect.isasyncgen(result) or inspect.isawaitable(result):
        raise TypeError(f"the agent returned {result!r}, which nothing runs; return its result instead")
    if isinstance(result, int | float) and not isinstance(result, bool) and not attempt.rewarded:
        emit_reward(result)
    return Outcome(status.SUCCEEDED, output=None if result is None else _as_json(result))


def _as_json(value: Any) -> str:
    try:
        return json_text(value, _plain)
    except ValueError:  # keys that JSON can't have, a circular reference, or too many levels
        return json_text(safe_repr(value))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    return str(value)
