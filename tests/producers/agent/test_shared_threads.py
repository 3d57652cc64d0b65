"""A worker thread that serves several rollouts is refused; whatever tells whose work it does is not."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from factories import task
from opentelemetry import trace

from millstream.producers.agent import shared_threads
from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.client_binding import OutsideRollout
from millstream.producers.agent.process_tracer import ProcessTracer, adopt_global_provider
from millstream.producers.agent.shared_threads import SharedWorker
from millstream.schemas.ids import new_id
from millstream.schemas.wire.records import Span

TRACER = ProcessTracer("m:agent")
adopt_global_provider()


class Worker:
    """What many libraries do: a thread, started at first use, that takes work from a queue."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self.thread: threading.Thread | None = None

    def call(self, work: Callable[[], Any]) -> Any:
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="shared", daemon=True)
            self.thread.start()
        future: Future[Any] = Future()
        self._queue.put((work, future))
        return future.result()

    def stop(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            future.set_result(work())


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests leave agents behind that never end."""
    monkeypatch.setattr(shared_threads, "_running", set())


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()


def new_attempt() -> tuple[AttemptContext, list[Span]]:
    spans: list[Span] = []
    return AttemptContext(task(), new_id(), spans.append, [].append), spans


def span() -> None:
    trace.get_tracer("library").start_span("work").end()


def test_a_worker_shared_by_rollouts_that_overlap_fails_the_one_that_started_it(worker: Worker) -> None:
    first, second = new_attempt()[0], new_attempt()[0]

    def overlap() -> None:
        with TRACER.attempt(first):
            worker.call(span)
            with TRACER.attempt(second):
                worker.call(span)

    with pytest.raises(SharedWorker, match="thread 'shared', which this rollout started"):
        overlap()


def test_a_worker_of_a_rollout_that_was_alone_is_nobody_elses(worker: Worker) -> None:
    attempt, spans = new_attempt()
    with TRACER.attempt(attempt):
        worker.call(span)
    assert [s.name for s in spans] == ["work", "invoke_agent m:agent"]


def test_threads_that_end_with_their_rollout_are_its_own() -> None:
    for attempt, spans in overlapping(worker_of_its_own):
        assert names_by_rollout(attempt, spans) == ["work", "invoke_agent m:agent"]


def worker_of_its_own() -> None:
    worker = Worker()
    worker.call(span)
    worker.stop()  # and not joined


def test_a_shared_executor_knows_whose_work_it_does() -> None:
    with ThreadPoolExecutor(2) as pool:
        for attempt, spans in overlapping(lambda: pool.submit(span).result()):
            assert names_by_rollout(attempt, spans) == ["work", "invoke_agent m:agent"]


def test_a_shared_loop_knows_whose_work_it_does() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def work() -> None:
        await asyncio.sleep(0)
        span()

    def call() -> None:
        if not loops:  # the first attempt starts it
            loops.append(asyncio.new_event_loop())
            threading.Thread(target=loops[0].run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(work(), loops[0]).result()

    for attempt, spans in overlapping(call):
        assert names_by_rollout(attempt, spans) == ["work", "invoke_agent m:agent"]
    loops[0].call_soon_threadsafe(loops[0].stop)


def overlapping(agent: Callable[[], Any]) -> list[tuple[AttemptContext, list[Span]]]:
    """Two attempts that begin one after the other and end in the same order."""
    made = [new_attempt(), new_attempt()]
    inside = threading.Event()

    def second() -> None:
        with TRACER.attempt(made[1][0]):
            agent()
            inside.set()
            first.join()

    with ThreadPoolExecutor(1) as pool:

        def run_first() -> None:
            with TRACER.attempt(made[0][0]):
                agent()
                beside.append(pool.submit(second))
                inside.wait(10)

        beside: list[Future[None]] = []
        first = threading.Thread(target=run_first)
        first.start()
        first.join()
        beside[0].result()
    return made


def names_by_rollout(attempt: AttemptContext, spans: list[Span]) -> list[str]:
    assert {s.attempt_id for s in spans} == {attempt.attempt_id}
    return [s.name for s in spans]


def test_a_thread_left_over_from_a_rollout_calls_no_model(monkeypatch: pytest.MonkeyPatch, worker: Worker) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "")  # what the tracer sets is undone after the test
    monkeypatch.setenv("OPENAI_API_KEY", "")
    tracer = ProcessTracer("m:agent", ["http://127.0.0.1:1"])

    def call() -> str:
        try:
            return httpx.post("http://127.0.0.1:1/v1/chat/completions").text
        except OutsideRollout as error:
            return str(error)

    with tracer.attempt(new_attempt()[0]):
        worker.call(span)
    assert "thread 'shared' belongs to a rollout that has ended" in worker.call(call)
