"""How attempts end when their agents leave something behind, or cancel and exit in parts of themselves."""

import asyncio
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from runner_rig import Rig, assert_whole, running, settings_for_tests, terminal, write_agent

import millstream as ms
from millstream.consumers.runner.outcome import name_signals_in_threads
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.wire.records import AttemptEvent, Span

MODES = pytest.mark.parametrize("processes", [0, 1], ids=["threads", "process"])

LEAVES = """
    import asyncio, threading, time
    import millstream as ms
    from opentelemetry import trace

    @ms.operation("numbers")
    async def numbers():
        for number in range(3):
            yield number

    async def later():
        ms.emit_span("later")

    async def breaks(input):
        async for _ in numbers():
            break
        return 1.0

    async def leaves_a_task(input):
        asyncio.get_running_loop().create_task(later())
        return 1.0

    async def ends_a_span_later(input):
        span = trace.get_tracer("mine").start_span("later")
        asyncio.get_running_loop().call_soon(span.end)
        return 1.0

    def leaves_a_thread(input):
        threading.Thread(target=ms.emit_span, args=("later",)).start()
        return 1.0
"""


@MODES
@pytest.mark.parametrize("agent", ["breaks", "leaves_a_task", "ends_a_span_later", "leaves_a_thread"])
async def test_a_span_that_ends_just_after_the_agent_is_late_and_harms_nothing(
    tmp_path: Path, processes: int, agent: str
) -> None:
    name = f"leaves_{processes}_{agent}"
    folder = write_agent(tmp_path, LEAVES, f"{name}.py")
    async with running(f"{name}:{agent}", folder, processes=processes, concurrency=8) as rig:
        await rig.publish(range(20))
        spans = 60  # reward, root, and the one that may be late
        events = await rig.read_until(lambda events: len(terminal(events)) + _spans(events) >= 20 + spans)
    for last in terminal(events):
        assert last.status == "succeeded", last.error
        mine = [e for e in events if isinstance(e, AttemptEvent | Span) and e.attempt_id == last.attempt_id]
        before = [e for e in mine[: mine.index(last)] if isinstance(e, Span)]
        assert last.span_counts == {"agent": len(before)}
        assert {span.kind for span in before} >= {"reward", "agent"}
        assert _spans(mine) == 3


def _spans(events: list[Any]) -> int:
    return sum(isinstance(e, Span) for e in events)


async def test_a_late_span_of_a_trace_without_a_runner_harms_nothing() -> None:
    async def agent(number: int) -> float:
        asyncio.get_running_loop().create_task(later())
        return 1.0

    async def later() -> None:
        ms.emit_span("later")

    tracer = ms.Tracer(agent)
    for number in range(10):
        async with tracer.trace(number) as trace:
            trace.result = await tracer(trace.rollout.input)
        assert trace.status == "succeeded"
        assert all(span.name != "later" or span.sequence for span in trace.spans)


PARTS = """
    import asyncio, sys, threading
    import millstream as ms

    async def awaits_what_it_cancelled(input):
        task = asyncio.create_task(asyncio.sleep(60))
        await asyncio.sleep(0)
        task.cancel()
        await task

    async def cancels_itself(input):
        asyncio.current_task().cancel()
        await asyncio.sleep(60)

    async def raises_it(input):
        raise asyncio.CancelledError("the connection broke")

    async def exits(code):
        await asyncio.sleep(0.01)
        sys.exit(code)

    async def part_exits(input):
        await asyncio.gather(exits(3), asyncio.sleep(60))

    async def part_interrupts(input):
        async def interrupts():
            raise KeyboardInterrupt
        await asyncio.create_task(interrupts())

    async def part_exits_alone(input):
        asyncio.create_task(exits(3))
        await asyncio.sleep(0.1)
        return 1.0

    async def callback_exits(input):
        asyncio.get_running_loop().call_soon(sys.exit, 3)
        await asyncio.sleep(0.1)
        return 1.0

    async def innocent(input):
        await asyncio.sleep(0.3)
        return 1.0

    async def agent(input):
        return await globals()[input](input)
"""

EXPECTED = {
    "awaits_what_it_cancelled": ("failed", "CancelledError", "awaited a task that had been cancelled"),
    "cancels_itself": ("failed", "CancelledError", "awaited a task that had been cancelled"),
    "raises_it": ("failed", "CancelledError", "the connection broke"),
    "part_exits": ("failed", "SystemExit", "3"),
    "part_interrupts": ("failed", "KeyboardInterrupt", ""),
    "part_exits_alone": ("succeeded", None, ""),
    "callback_exits": ("succeeded", None, ""),
    "innocent": ("succeeded", None, ""),
}


@MODES
async def test_only_the_runner_cancels_an_attempt_and_a_part_that_exits_ends_alone(
    tmp_path: Path, processes: int
) -> None:
    """An agent that cancels parts of itself has failed and is retried; its neighbours notice nothing."""
    folder = write_agent(tmp_path, PARTS, f"parts_{processes}.py")
    async with running(f"parts_{processes}:agent", folder, processes=processes, concurrency=8) as rig:
        await rig.publish(EXPECTED)
        ended = {json.loads(text): one.last for text, one in (await rig.ends(len(EXPECTED))).items()}
        await rig.publish(["innocent"])  # the loop still runs
        await rig.read_until(lambda events: len(terminal(events)) == len(EXPECTED) + 1)
    for name, (status, error, message) in EXPECTED.items():
        last = ended[name]
        assert (last.status, last.error and last.error.type) == (status, error), name
        assert message in (last.error.message if last.error else ""), name


@MODES
async def test_an_agent_that_returns_during_a_model_call_has_failed(tmp_path: Path, processes: int) -> None:
    """Not lost: it is its own doing, and counts against max_attempts."""

    async def close(request: web.Request) -> web.Response:
        return web.json_response({"spans": 2, "cancelled": 1})

    app = web.Application()
    app.add_routes([web.post("/rollout/{rollout}/attempt/{attempt}/close", close)])
    code = """
        def agent(input):
            if input == 2:
                raise ValueError("no")
            return 1.0
    """
    folder = write_agent(tmp_path, code, f"returns_{processes}.py")
    async with serve(app, "http://127.0.0.1:0") as url:
        settings = settings_for_tests(proxy_url=url)
        async with running(f"returns_{processes}:agent", folder, processes=processes, settings=settings) as rig:
            await rig.publish([1, 2])
            ended = await rig.ends(2)
    assert_whole(ended)
    last = ended["1"].last
    assert last.error is not None
    assert (last.status, last.error.type) == ("failed", "unfinished_calls")
    assert "1 model calls under way" in last.error.message
    assert last.span_counts["proxy"] == 2
    assert ended["2"].last.error is not None
    assert ended["2"].last.error.type == "ValueError"


THREADS = """
    import asyncio, signal, threading, time

    def alarms(input):
        def ring(*_):
            raise TimeoutError("the alarm")
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(10)
        except TimeoutError:
            return 1.0

    def loops(input):
        loop = asyncio.get_event_loop()
        return float(loop.run_until_complete(asyncio.sleep(0, 1)) + (asyncio.get_event_loop() is loop))

    def runs(input):
        asyncio.run(asyncio.sleep(0))
        return 1.0

    def where(input):
        return threading.current_thread() is threading.main_thread()

    def agent(input):
        return globals()[input](input)
"""


async def test_a_sync_agent_has_the_main_thread_of_a_process_that_runs_one_attempt_at_a_time(tmp_path: Path) -> None:
    """So signals work, as in math_verify's time limit."""
    folder = write_agent(tmp_path, THREADS, "threads_main.py")
    async with running("threads_main:agent", folder, processes=1, concurrency=1) as rig:
        await rig.publish(["where", "alarms", "loops", "runs", "alarms"])
        await rig.read_until(lambda events: len(terminal(events)) == 5)
        events = await rig.everything()
    assert [last.status for last in terminal(events)] == ["succeeded"] * 5
    assert sorted(s.reward for s in events if isinstance(s, Span) and s.kind == "reward") == [1.0, 1.0, 1.0, 1.0, 2.0]


@MODES
async def test_several_sync_agents_have_event_loops_of_their_own_and_a_hint_about_signals(
    tmp_path: Path, processes: int
) -> None:
    folder = write_agent(tmp_path, THREADS, f"threads_{processes}.py")
    async with running(f"threads_{processes}:agent", folder, processes=processes, concurrency=4) as rig:
        await rig.publish(["loops", "runs", "alarms", "where"])
        ended = {json.loads(text): one for text, one in (await rig.ends(4)).items()}
    assert (ended["loops"].rewards, ended["runs"].rewards, ended["where"].rewards) == ([2.0], [1.0], [0.0])
    error = ended["alarms"].last.error
    assert error is not None
    assert "signal only works in main thread" in error.message
    assert "--concurrency 1" in error.message


async def test_an_attempt_for_which_no_thread_can_be_started_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from millstream.consumers.runner import attempt

    def no_thread(work: object, name: str) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(attempt, "_in_thread", no_thread)
    async with running(lambda question: 1.0) as rig:
        await rig.publish([1])
        (one,) = (await rig.ends(1)).values()
    assert one.last.error is not None
    assert (one.last.status, one.last.error.type) == ("lost", "thread")


FORGES = """
    import asyncio, dataclasses, gc
    import millstream as ms
    from millstream.consumers.runner.hosts import frames
    from millstream.producers.agent.attempt import current_attempt
    from millstream.producers.agent.emit import emit_reward

    def sender():
        return next(each for each in gc.get_objects() if type(each).__name__ == "AttemptSender")

    def channel():
        return next(each for each in gc.get_objects() if type(each).__name__ == "Channel")

    def forged(input):
        attempt, mine = current_attempt(), sender()
        emit, seen = attempt.emit, []
        attempt.emit = seen.append
        emit_reward(1000.0)
        attempt.emit = emit
        (span,) = seen
        from millstream.schemas.wire import codec
        for changes in ({"rollout_id": "another"}, {"attempt_id": "another"}, {"source": "proxy"}, {"source": "otlp"}):
            data = codec.encode(dataclasses.replace(span, **changes))
            for number in (mine._number, 999):
                mine._channel.send(lambda: frames.pack(frames.Kind.SPAN, number, b"reward", data), now=True)
        right = codec.encode(span)
        mine._channel.send(lambda: frames.pack(frames.Kind.SPAN, 999, b"reward", right), now=True)
        mine._channel.send(lambda: frames.pack(frames.Kind.BLOB, 999, b"0" * 64, b"x"), now=True)
        mine._channel.send(lambda: frames.pack(frames.Kind.ENDED, 999, b"{}"), now=True)
        return "forged"

    def huge(input):
        channel().send(lambda: frames._HEAD.pack(frames.Kind.SPAN, 1, 10, 0xFFFFFFFF), now=True)
        import time
        time.sleep(20)

    def nonsense(input):
        channel().send(lambda: b"\\xff" * 40, now=True)
        import time
        time.sleep(20)

    def agent(input):
        return globals()[input](input)
"""


async def test_a_process_writes_to_its_own_attempts_only_and_as_an_agent(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, FORGES, "forges.py")
    async with running("forges:agent", folder, processes=1, concurrency=2) as rig:
        await rig.publish(["forged"])
        (one,) = (await rig.ends(1)).values()
        events = await rig.everything()
    assert one.last.status == "succeeded", one.last.error
    assert [s.reward for s in events if isinstance(s, Span) and s.kind == "reward"] == []


@pytest.mark.parametrize("agent", ["huge", "nonsense"])
async def test_a_process_that_sends_what_can_not_be_read_is_ended_with_the_reason(tmp_path: Path, agent: str) -> None:
    folder = write_agent(tmp_path, FORGES, "forges.py")
    rig: Rig
    async with running("forges:agent", folder, processes=1, concurrency=2) as rig:
        await rig.publish([agent])
        (one,) = (await rig.ends(1)).values()
    assert one.last.error is not None
    assert (one.last.status, one.last.error.type) == ("failed", "frame")
    assert "of 167,772,160" in one.last.error.message


def test_a_signal_that_an_agent_cant_set_in_a_thread_is_logged_although_it_swallows_the_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Entry D2: as with SIGALRM in math_verify's ``parse`` below ``except: return 0.0``."""
    monkeypatch.setattr(signal, "signal", signal.signal)  # put back afterwards
    name_signals_in_threads()
    rewards: list[float] = []

    def agent() -> None:
        try:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        except ValueError:
            rewards.append(0.0)

    for _ in range(2):
        thread = threading.Thread(target=agent)
        thread.start()
        thread.join()
    assert rewards == [0.0, 0.0]
    (record,) = caplog.records  # once a process
    assert "--processes N --concurrency 1" in record.getMessage()
    assert signal.signal(signal.SIGUSR1, signal.SIG_DFL) == signal.SIG_DFL  # in the main thread
