"""Records rewards and spans from an agent's own code.

No function here blocks, so all can be called from ``async def``. Each raises `EmitError` for a value that can't be
recorded. Outside a rollout they only warn, once per process.
"""

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from traceback import TracebackException
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace.status import StatusCode
from pydantic_core import PydanticSerializationError, to_json

from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.producers.agent.shared_threads import note_call
from millstream.producers.agent.span_processor import to_record
from millstream.schemas.errors import MillstreamError
from millstream.schemas.spans import semconv
from millstream.schemas.spans.text import as_text, safe_repr, texts

logger = logging.getLogger(__name__)
_warned = threading.Event()

# Large contents pass through the agent's process and its runner to the blob store.
MAX_ATTRIBUTE_BYTES = 64 << 20
MAX_SPAN_BYTES = 128 << 20


class EmitError(MillstreamError, ValueError):
    """A value can't be recorded. The message names the span and the attribute."""


class RewardError(EmitError):
    """A reward that is not a finite number."""


def attempt_or_warning(what: str) -> AttemptContext | None:
    """The attempt of the calling code. Without one, logs a warning once per process and returns None."""
    attempt = current_attempt()
    if attempt is None and not _warned.is_set():
        _warned.set()
        logger.warning("%s is not recorded: this code does not run within a rollout", what)
    return attempt


def emit_reward(value: float | Mapping[str, float], name: str | None = None, *, for_call: str | None = None) -> None:
    """Records a reward. It is credited to the latest model call that ended before it, or to the one whose response id
    is ``for_call`` (``completion.id``).

    ``value`` is a number, recorded under ``name`` (default ``reward``), or a dict of rewards by name. May be called any
    number of times. All rewards are added up, whatever their names: ``{"correct": 1.0, "short": 0.2}`` earns 1.2.
    Raises `RewardError`, and records none of them, unless each is a finite number.
    """
    if not isinstance(value, Mapping):
        rewards = {name or "reward": value}
    elif name is not None or not value:
        raise RewardError(
            f"rewards {safe_repr(dict(value))}, name={name!r}: pass a dict of at least one reward, without a name"
        )
    else:
        rewards = dict(value)
    numbers = {each: _finite(each, number) for each, number in rewards.items()}
    for each, number in numbers.items():
        emit_span(
            each,
            {
                semconv.OPERATION: "evaluation",
                semconv.EVALUATION_NAME: each,
                semconv.EVALUATION_SCORE: number,
                semconv.AGL_REWARD_NAME: each,
                semconv.AGL_REWARD_VALUE: number,
                **({} if for_call is None else {semconv.REWARD_FOR: for_call}),
            },
        )


def emit_span(name: str, attributes: Mapping[str, Any] | None = None) -> None:
    """Records a span of zero duration, below the current one.

    ``attributes`` hold JSON values, at most `MAX_ATTRIBUTE_BYTES` each and `MAX_SPAN_BYTES` in total.
    ``gen_ai.operation.name`` sets its kind (``execute_tool``: a tool call), ``error.type`` marks it as failed.
    """
    given = checked(name, attributes)
    _moment(name, given, given.get(semconv.ERROR_TYPE))


def emit_otel_span(name: str, attributes_or_span: Mapping[str, Any] | ReadableSpan | None = None) -> None:
    """Records an OpenTelemetry span that was created elsewhere, for example in another process, under this name. Keeps
    its times, status, events and links, and its parent; without a parent, it becomes a child of the current span.
    Attributes instead of a span are recorded as by `emit_span`.

    Spans created here with OpenTelemetry's global tracer provider are recorded without this call.
    """
    span = attributes_or_span
    if not isinstance(span, ReadableSpan):
        emit_span(name, span)
        return
    checked(name, span.attributes)
    if span.get_span_context() is None or span.end_time is None:
        raise EmitError(f"span {name!r}: a span can be recorded only after it has ended")
    attempt = attempt_or_warning(f"span {name!r}")
    if attempt is None:
        return
    note_call(attempt)
    record = replace(to_record(span, attempt, texts(span.resource.attributes)), name=name)
    here = trace.get_current_span().get_span_context()
    if here.is_valid:
        parent = record.parent_id or f"{here.span_id:016x}"
        record = replace(record, trace_id=f"{here.trace_id:032x}", parent_id=parent)
    attempt.emit(record)


def emit_message(message: str, attributes: Mapping[str, Any] | None = None) -> None:
    """Records a line of text, like a log line."""
    if not isinstance(message, str):
        raise EmitError(f"a message must be a string, not {type(message).__name__}; use emit_object for other values")
    emit_span(semconv.AGL_MESSAGE, {semconv.AGL_MESSAGE_BODY: message, **(attributes or {})})


def emit_object(value: Any, attributes: Mapping[str, Any] | None = None) -> None:
    """Records a value as JSON, with its type. Takes JSON values, dataclasses, pydantic models, dates, sets and bytes
    (as base64)."""
    kind = type(value)
    full_name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        text = to_json(value, bytes_mode="base64", inf_nan_mode="strings").decode()
    except (PydanticSerializationError, ValueError, RecursionError) as error:
        raise EmitError(f"span {semconv.AGL_OBJECT!r}: an object of type {full_name} is not JSON: {error}") from error
    given = {semconv.AGL_OBJECT_TYPE: full_name, semconv.AGL_OBJECT_JSON: text}
    emit_span(semconv.AGL_OBJECT, given | dict(attributes or {}))


def emit_exception(exception: BaseException, attributes: Mapping[str, Any] | None = None) -> None:
    """Records an error that the agent handled, as a failed span with its type, message and stack."""
    told = TracebackException.from_exception(exception)
    kind, message = type(exception).__name__, str(told)
    given = {
        semconv.ERROR_TYPE: kind,
        semconv.EXCEPTION_TYPE: kind,
        semconv.EXCEPTION_MESSAGE: message,
        semconv.EXCEPTION_STACK: "".join(told.format()),
        **(attributes or {}),
    }
    _moment(semconv.AGL_EXCEPTION, checked(semconv.AGL_EXCEPTION, given), f"{kind}: {message}")


def emit_annotation(attributes: Mapping[str, Any]) -> None:
    """Records tags, notes or measurements about the rollout at this point."""
    emit_span(semconv.AGL_ANNOTATION, attributes)


def checked(name: str, attributes: Mapping[str, Any] | None) -> dict[str, str]:
    """Converts the attributes to text. Raises `EmitError` for one that is not JSON or is too large."""
    given: dict[str, str] = {}
    total = len(name)
    for key, value in (attributes or {}).items():
        if not isinstance(key, str):
            raise EmitError(f"span {name!r}: attribute name {safe_repr(key)} is not a string")
        try:
            given[key] = text = as_text(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise EmitError(f"span {name!r}: attribute {key!r} is not JSON: {error}") from error
        size = len(text) if text.isascii() else len(text.encode())
        if size > MAX_ATTRIBUTE_BYTES:
            raise _too_large(f"span {name!r}: attribute {key!r}", size, MAX_ATTRIBUTE_BYTES)
        total += len(key) + size
    if total > MAX_SPAN_BYTES:
        raise _too_large(f"span {name!r}: its attributes", total, MAX_SPAN_BYTES)
    return given


def _too_large(what: str, size: int, limit: int) -> EmitError:
    return EmitError(
        f"{what}: {size:,} bytes, of at most {limit:,}. Keep it in a file or object store and record its name here"
    )


def number_of(value: Any) -> float | None:
    """What `emit_reward` takes as a number: int, float, bool, `Decimal`, `Fraction`, and NumPy's and PyTorch's scalars
    (arrays of no dimension, on any device). None for anything else: text, containers, arrays, complex numbers, times.
    """
    if isinstance(value, str | bytes | bytearray) or getattr(value, "shape", ()) != ():
        return None
    if getattr(getattr(value, "dtype", None), "kind", "f") in "mMOSUV":  # NumPy's times, objects and texts
        return None
    if isinstance(value, Decimal) and value.is_snan():  # float() refuses it
        return math.nan
    try:
        return float(value) if hasattr(value, "__float__") else None
    except (TypeError, ValueError):
        return None
    except OverflowError:  # an integer beyond a float's range
        return math.inf


def _finite(name: str, value: Any) -> float:
    number = number_of(value)
    if number is None or not math.isfinite(number):
        raise RewardError(f"reward {name!r} is {safe_repr(value)[:100]}; it must be a finite number")
    return number


def _moment(name: str, given: Mapping[str, str], failure: str | None) -> None:
    attempt = attempt_or_warning(f"span {name!r}")
    if attempt is None:
        return
    now = time.time_ns()
    span = attempt.tracer.start_span(name, attributes=given, start_time=now)
    if failure is not None:
        span.set_status(StatusCode.ERROR, failure)
    span.end(now)
