"""Threads that an agent starts belong to its attempt, and only to that.

A thread has the context of the code that started it. Executors and event loops hand over the context with each piece of
work. A worker that takes its work from a queue does not: started in one attempt, and used by others too, it would have
all its calls recorded for the first, and nothing in the process tells whose they were. But it outlives that attempt.
So an attempt fails if a thread of its own that made calls still lives at its end, and others ran beside it.
"""

import threading
import time
from typing import Any

import wrapt
from opentelemetry import context as otel
from opentelemetry.context import Context

from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.schemas.errors import MillstreamError

GRACE_S = 0.5  # for threads that end just after they have handed over their result

_THREAD = otel.create_key("millstream.thread")
_running: set[AttemptContext] = set()


class SharedWorker(MillstreamError, RuntimeError):
    """A thread started in one attempt may have made calls for others."""


def follow_threads() -> None:
    """From now on, contexts tell which thread inherited them. Call it once, after OpenTelemetry's instrumentation of
    threads: the context that a thread inherits is taken by that."""
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
    """From any thread. No lock: a process that the agent forks would inherit it, perhaps held."""
    _running.add(attempt)
    together = tuple(_running)
    if len(together) > 1:
        for each in together:
            each.alone = False


def ended(attempt: AttemptContext) -> None:
    attempt.ended = True
    _running.discard(attempt)


def running_attempt(rollout_id: str) -> AttemptContext | None:
    """This rollout's attempt, if it runs in this process."""
    return next((attempt for attempt in tuple(_running) if attempt.task.rollout_id == rollout_id), None)


def note_call(attempt: AttemptContext, context: Context | None = None) -> None:
    """The attempt's code makes a call or a span here."""
    thread = otel.get_value(_THREAD, context)
    if thread is not None and thread is threading.current_thread():
        attempt.threads.add(threading.current_thread())


def refuse_shared(attempt: AttemptContext) -> None:
    """Raises `SharedWorker` if what the attempt's threads recorded may be another's. Waits `GRACE_S` at most."""
    if attempt.alone or not attempt.threads:
        return
    deadline = time.monotonic() + GRACE_S
    for thread in attempt.threads - {threading.current_thread()}:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            raise SharedWorker(
                f"thread {thread.name!r}, which this rollout started, called models or made spans and still runs at "
                "its end. If other rollouts give it work, their calls have been recorded here. Join it; or let a "
                "ThreadPoolExecutor be the worker, which knows whose work it does; or run the work by "
                "contextvars.copy_context().run, copied where it is given, and start the thread when the module is "
                "imported; or run one rollout in a process (--concurrency 1 --max-attempts-per-process 1)"
            )
