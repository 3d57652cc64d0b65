"""Detects threads that an attempt started and other attempts may use.

A thread inherits the context of the code that starts it. Executors and event loops pass the context with each piece of
work; a thread that reads work from a queue does not. If several attempts use such a thread, all its calls are recorded
for the one that started it, and can't be attributed correctly. But it outlives that attempt. So an attempt fails if it
ran at the same time as others and one of its threads that made calls or spans is still alive at its end.
"""

import threading
import time
from typing import Any

import wrapt
from opentelemetry import context as otel
from opentelemetry.context import Context

from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.schemas.errors import MillstreamError

GRACE_S = 0.5  # for threads that end just after they return their result

_THREAD = otel.create_key("millstream.thread")
_running: set[AttemptContext] = set()


class SharedWorker(MillstreamError, RuntimeError):
    """A thread that one attempt started may have made calls for others."""


def follow_threads() -> None:
    """Stores in each inherited context the thread that inherits it. Call it once, after OpenTelemetry's threading
    instrumentation, which copies the context."""
    wrapt.wrap_function_wrapper(threading, "Thread.start", _start)


def _start(wrapped: Any, thread: threading.Thread, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if current_attempt() is None:
        return wrapped(*args, **kwargs)
    token = otel.attach(otel.set_value(_THREAD, thread))
    try:
        return wrapped(*args, **kwargs)
    finally:
        otel.detach(token)


def began(attempt: AttemptContext) -> None:
    """Thread-safe without a lock, which a forked process might inherit while it is held."""
    _running.add(attempt)
    together = tuple(_running)
    if len(together) > 1:
        for each in together:
            each.alone = False


def ended(attempt: AttemptContext) -> None:
    attempt.ended = True
    _running.discard(attempt)


def running_attempt(rollout_id: str) -> AttemptContext | None:
    """The rollout's attempt in this process, or None."""
    return next((attempt for attempt in tuple(_running) if attempt.task.rollout_id == rollout_id), None)


def note_call(attempt: AttemptContext, context: Context | None = None) -> None:
    """Notes that the current thread makes a call or a span, if the attempt started it."""
    thread = otel.get_value(_THREAD, context)
    if thread is not None and thread is threading.current_thread():
        attempt.threads.add(threading.current_thread())


def refuse_shared(attempt: AttemptContext) -> None:
    """Raises `SharedWorker` if the attempt's threads may have recorded work of another one. Waits at most `GRACE_S`."""
    if attempt.alone or not attempt.threads:
        return
    deadline = time.monotonic() + GRACE_S
    for thread in attempt.threads - {threading.current_thread()}:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            raise SharedWorker(
                f"thread {thread.name!r}, which this rollout started, called models or made spans and still runs at "
                "its end. If other rollouts use it, their calls are recorded here. Join it; or use a "
                "ThreadPoolExecutor, which runs each task in its rollout's context; or start the thread when the "
                "module is imported and run the work with contextvars.copy_context().run, copied where the work is "
                "submitted; or run one rollout per process (--concurrency 1 --max-attempts-per-process 1)"
            )
