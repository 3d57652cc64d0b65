"""Supervises what a role runs in the background: tasks of its event loop, and threads.

A role's main coroutine is awaited, so its failure ends the role. A background task that dies is silent: its duty is no
longer done, and everything else looks healthy. So each is started by a `Supervisor`, which knows whether it may end.
An unexpected end is logged with its stack and takes the role down: `pipeline.services.role_process` fails the probes
and ends the process; a deployment within one process raises `BackgroundFailed`.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from millstream.schemas.errors import BackgroundFailed

logger = logging.getLogger(__name__)


class Background:
    """One task. Whoever started it ends it with ``cancel`` or ``close``; any other cancellation is a failure."""

    def __init__(self, name: str, task: "asyncio.Task[None]") -> None:
        self.name = name
        self.task = task
        self.ended = False  # by its owner
        self._succeeded_at: float | None = None

    def succeeded(self) -> None:
        """Notes that its work was done just now. Its age counts from here."""
        self._succeeded_at = time.monotonic()

    @property
    def age_s(self) -> float:
        """Since the last success; 0 for a task that does not report any. Any thread may ask."""
        return 0.0 if self._succeeded_at is None else time.monotonic() - self._succeeded_at

    def cancel(self) -> None:
        self.ended = True
        self.task.cancel()

    async def close(self) -> None:
        """Cancels it, and returns when it has ended."""
        self.cancel()
        await asyncio.wait([self.task])


class Supervisor:
    """Of one role. ``on_failure`` is called once, from any thread, at the first unexpected end."""

    def __init__(self, on_failure: Callable[[BackgroundFailed], object] = lambda failure: None) -> None:
        self.failure: BackgroundFailed | None = None  # the first one
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._tasks: set[Background] = set()
        self._threads: tuple[threading.Thread, ...] = ()
        self._closed = False

    @property
    def tasks(self) -> tuple[Background, ...]:
        """Those that have not ended. Any thread may ask."""
        with self._lock:
            return tuple(self._tasks)

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        return tuple(thread for thread in self._threads if thread.is_alive())

    @property
    def age_s(self) -> float:
        """Since the last success of the task that has been without one longest."""
        return max((background.age_s for background in self.tasks), default=0.0)

    def loop(self, name: str, work: Coroutine[Any, Any, None]) -> Background:
        """Starts a task that runs until its owner ends it."""
        return self._start(name, work, endless=True)

    def job(self, name: str, work: Coroutine[Any, Any, None]) -> Background:
        """Starts a task that may return, but neither raise nor be cancelled by others."""
        return self._start(name, work, endless=False)

    def thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        """Starts a daemon thread that may return, but not raise."""

        def run() -> None:
            try:
                target()
            except BaseException as error:  # SystemExit, too, would end the thread silently
                self.failed(f"thread {name}", error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads = (*self.threads, thread)
        thread.start()
        return thread

    def failed(self, what: str, error: BaseException | None = None) -> None:
        """Reports an unexpected end. Any thread may call it."""
        if self._closed:
            return
        how = "returned" if error is None else f"was ended by {type(error).__name__}: {error}".rstrip(": ")
        failure = BackgroundFailed(f"{what} {how}; it must not end while its role runs")
        logger.critical("%s", failure, exc_info=error)
        with self._lock:
            first, self.failure = self.failure is None, self.failure or failure
        if first:
            self._on_failure(failure)

    def close(self) -> None:
        """From now on nothing is reported: the role ends."""
        self._closed = True

    def _start(self, name: str, work: Coroutine[Any, Any, None], *, endless: bool) -> Background:
        background = Background(name, asyncio.get_running_loop().create_task(work, name=name))
        with self._lock:
            self._tasks.add(background)

        def ended(task: "asyncio.Task[None]") -> None:
            with self._lock:
                self._tasks.discard(background)
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if not background.ended and (endless or error is not None):
                self.failed(f"task {name}", error)
            elif error is not None and not task.cancelled():
                logger.error("task %s failed while it was ended", name, exc_info=error)

        background.task.add_done_callback(ended)
        return background


_current: ContextVar[Supervisor] = ContextVar("supervisor", default=Supervisor())  # noqa: B039


def supervisor() -> Supervisor:
    """That of the role that runs here. Outside of any role failures are only logged."""
    return _current.get()


@contextmanager
def supervised(on_failure: Callable[[BackgroundFailed], object] = lambda failure: None) -> Iterator[Supervisor]:
    """A supervisor for all that is started within the body, also by tasks and by `asyncio.to_thread`."""
    found = Supervisor(on_failure)
    token = _current.set(found)
    try:
        yield found
    finally:
        found.close()
        _current.reset(token)
