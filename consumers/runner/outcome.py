"""How an attempt ended, as its own side sees it: the agent returned, raised, or was stopped."""

import asyncio
import functools
import inspect
import logging
import signal
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from numbers import Integral
from typing import Any, Final

from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.emit import emit_reward, number_of
from millstream.schemas.import_path import error_message
from millstream.schemas.redaction import without_passwords
from millstream.schemas.spans.text import json_text, safe_repr, utf8
from millstream.schemas.wire import status
from millstream.schemas.wire.records import ErrorInfo

logger = logging.getLogger(__name__)


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


_SIGNALS: Final = "signal only works in main thread"  # of CPython's ValueError
SIGNALS_HINT: Final = (
    "a sync agent runs in a thread, unless its process runs one attempt at a time: use --processes N --concurrency 1, "
    "or a time-out without signals"
)


def name_signals_in_threads() -> None:
    """Logs the first `signal.signal` that fails in a thread, with what to do: agents often swallow the error, and their
    rewards are then 0. For a process that runs agents in threads."""
    set_handler, named = signal.signal, threading.Event()

    @functools.wraps(set_handler)
    def setting(number: Any, handler: Any) -> Any:
        try:
            return set_handler(number, handler)
        except ValueError as error:
            if _SIGNALS in str(error) and not named.is_set():
                named.set()
                logger.warning("an agent can't set a signal handler: %s (%s)", error, SIGNALS_HINT, stack_info=True)
            raise

    signal.signal = setting  # type: ignore[assignment]


def stopped_by(how: str, cause: str, message: str) -> Outcome:
    """The outcome of an attempt that was ended from outside the agent's code."""
    return Outcome(how, ErrorInfo(type=cause, message=without_passwords(message), stack=""))


def raised(error: BaseException, *, asked: bool = False) -> Outcome:
    """``asked``: the attempt was asked to end, so a CancelledError means that it did. Without that, it comes from
    something that the agent itself cancelled and awaited: a failure like any other."""
    cancelled = isinstance(error, asyncio.CancelledError)
    stack = without_passwords(utf8("".join(traceback.format_exception(error))))
    message = without_passwords(error_message(error))
    if cancelled and not asked:
        message = message or "the agent awaited a task that had been cancelled, not by the runner"
    elif isinstance(error, ValueError) and _SIGNALS in message:
        message = f"{message} ({SIGNALS_HINT})"
    info = ErrorInfo(type=type(error).__name__, message=message, stack=stack)
    return Outcome(status.CANCELLED if cancelled and asked else status.FAILED, info)


def returned(attempt: AttemptContext, result: Any) -> Outcome:
    """Called within the attempt. A number that the agent returns (see `number_of`) is its reward, unless it has emitted
    one; anything else is its output."""
    if inspect.isgenerator(result) or inspect.isasyncgen(result) or inspect.isawaitable(result):
        raise TypeError(f"the agent returned {result!r}, which nothing runs; return its result instead")
    if not attempt.rewarded and number_of(result) is not None:
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
    if (number := number_of(value)) is not None:
        return int(value) if isinstance(value, Integral) else number
    return str(value)
