"""What an agent says for itself: rewards, and spans of its own making."""

import logging
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.trace.status import StatusCode

from millstream.producers.attempt_context import Attempt, current_attempt
from millstream.producers.span_processor import as_text
from millstream.schemas import semconv
from millstream.schemas.errors import MillstreamError

logger = logging.getLogger(__name__)
_warned = threading.Event()


class RewardError(MillstreamError, ValueError):
    """A reward that is not a finite number."""


def attempt_or_warning(what: str) -> Attempt | None:
    """The attempt that the calling code belongs to. Without one, says so once in a process."""
    attempt = current_attempt()
    if attempt is None and not _warned.is_set():
        _warned.set()
        logger.warning("%s is recorded nowhere: this code does not run within a rollout", what)
    return attempt


def emit_reward(value: float, name: str = "reward", *, for_call: str | None = None) -> None:
    """Records a reward for what the agent has just done: it counts for the latest model call that ended before it, or
    for the one whose response id is ``for_call`` (``completion.id``).

    May be called any number of times. Raises `RewardError` unless ``value`` is a finite number. Outside a rollout it
    does nothing but warn, once.
    """
    try:
        number = float(value) if hasattr(value, "__float__") else math.nan  # not from text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"reward {name!r} is {value!r}; it has to be a finite number")
    emit_span(
        name,
        {
            semconv.OPERATION: "evaluation",
            semconv.EVALUATION_NAME: name,
            semconv.EVALUATION_SCORE: number,
            semconv.AGL_REWARD_NAME: name,
            semconv.AGL_REWARD_VALUE: number,
            **({} if for_call is None else {semconv.REWARD_FOR: for_call}),
        },
    )


def emit_span(name: str, attributes: Mapping[str, Any] | None = None) -> None:
    """Records a moment: a span without length, below the current one.

    ``attributes`` hold anything JSON does. ``gen_ai.operation.name`` says what it is (``execute_tool``: a tool call),
    ``error.type`` makes it a failure. Outside a rollout it does nothing but warn, once.
    """
    attempt = attempt_or_warning(f"span {name!r}")
    if attempt is None:
        return
    given = {key: as_text(value) for key, value in (attributes or {}).items()}
    now = time.time_ns()
    span = attempt.tracer.start_span(name, attributes=given, start_time=now)
    if semconv.ERROR_TYPE in given:
        span.set_status(StatusCode.ERROR, given[semconv.ERROR_TYPE])
    span.end(now)
