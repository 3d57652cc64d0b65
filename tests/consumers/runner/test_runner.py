"""The runner as a whole: the same agents in child processes and in threads."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from factories import task
from pydantic import SecretStr
from runner_rig import Rig, assert_whole, by_input, running, settings_for_tests, write_agent

import millstream as ms
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.runner import RunnerPolicy
from millstream.producers.control import publish_resources
from millstream.producers.log.port import OnAck
from millstream.schemas.attempt_keys import claims_of
from millstream.schemas.control import LLM, PromptTemplate, Resources
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import AttemptEvent, DeadLetter, Span

KINDS_OF_AGENT = """
    import asyncio, dataclasses, os, sys, threading, time
    from decimal import Decimal
    from fractions import Fraction
    from pathlib import Path
    import numpy as np
    import millstream as ms

    def sync_number(input):
        ms.emit_span("work", {"n": 1})
        return 0.5

    async def async_number(input):
        await asyncio.sleep(0)
        return 2

    def rewards_win(input):
        ms.emit_reward(0.25)
        return 7

    def true(input):
        return True

    def numpy_float(input):
        return np.float32(0.5)

    def numpy_integer(input):
        return np.int64(7)

    def numpy_array(input):
        return np.array(0.25)

    def numpy_bool(input):
        return np.bool_(True)

    def decimal(input):
        return Decimal("0.125")

    def fraction(input):
        return Fraction(3, 4)

    def numpy_vector(input):
        return np.array([0.5])

    def text(input):
        return "1.5"

    def complex_number(input):
        return 1 + 0j

    def numpy_time(input):
        return np.timedelta64(5, "s")

    def numpy_nan(input):
        return np.float64("nan")

    def huge(input):
        return 10**400

    @dataclasses.dataclass
    class Answer:
        city: str

    def other(input):
        return {"answer": Answer("Zürich"), "pair": (1, 2), "sync": None}

    def nothing(input):
        pass

    def nan(input):
        return float("nan")

    def raises(input):
        ms.emit_span("before")
        raise KeyError("no such tool")

    async def async_raises(input):
        raise ValueError(chr(0xD83D))  # half a character

    def leaves(input):
        sys.exit(3)

    async def async_leaves(input):
        sys.exit(3)

    def wrapped(input):
        return async_number(input)

    class Callable:
        async def __call__(self, input, *, rollout, resources):
            given = [rollout.mode, rollout.attempt, rollout.input, dict(rollout.metadata)]
            return [*given, resources["ask"].format(q="x"), resources["policy"].model_version, resources["mine"]]

    asks = Callable()

    def not_told(input, **anything):
        return sorted(anything)

    NOT_CALLABLE = 1

    def agent(input):
        return globals()[input](input)

    async def async_agent(input):
        return await globals()[input](input)
"""

MODES = pytest.mark.parametrize("processes", [0, 1], ids=["threads", "process"])


# name: status, error, output, rewards
SYNC = {
    "sync_number": ("succeeded", None, "0.5", [0.5]),
    "rewards_win": ("succeeded", None, "7", [0.25]),
    "true": ("succeeded", None, "true", [1.0]),
    "numpy_float": ("succeeded", None, "0.5", [0.5]),
    "numpy_integer": ("succeeded", None, "7", [7.0]),
    "numpy_array": ("succeeded", None, "0.25", [0.25]),
    "numpy_bool": ("succeeded", None, "1.0", [1.0]),
    "decimal": ("succeeded", None, "0.125", [0.125]),
    "fraction": ("succeeded", None, "0.75", [0.75]),
    "numpy_vector": ("succeeded", None, '"[0.5]"', []),
    "text": ("succeeded", None, '"1.5"', []),
    "complex_number": ("succeeded", None, '"(1+0j)"', []),
    "numpy_time": ("succeeded", None, '"5 seconds"', []),
    "numpy_nan": ("failed", "RewardError", None, []),
    "huge": ("failed", "RewardError", None, []),
    "other": ("succeeded", None, '{"answer": {"city": "Zürich"}, "pair": [1, 2], "sync": null}', []),
    "nothing": ("succeeded", None, None, []),
    "nan": ("failed", "RewardError", None, []),
    "raises": ("failed", "KeyError", None, []),
    "leaves": ("failed", "SystemExit", None, []),
    "wrapped": ("succeeded", None, "2", [2.0]),
}
ASYNC = {
    "async_number": ("succeeded", None, "2", [2.0]),
    "async_raises": ("failed", "ValueError", None, []),
    "async_leaves": ("failed", "SystemExit", None, []),
}


@MODES
@pytest.mark.parametrize(("agent", "expected"), [("agent", SYNC), ("async_agent", ASYNC)], ids=["sync", "async"])
async def test_an_attempt_ends_as_its_agent_does(
    tmp_path: Path, processes: int, agent: str, expected: dict[str, tuple[Any, ...]]
) -> None:
    folder = write_agent(tmp_path, KINDS_OF_AGENT, f"kinds_{processes}.py")
    async with running(f"kinds_{processes}:{agent}", folder, processes=processes) as rig:
        await rig.publish(expected)
        ended = {json.loads(text): one for text, one in (await rig.ends(len(expected))).items()}
    assert_whole(ended)
    for name, one in ended.items():
        error = one.last.error
        assert (one.last.status, error and error.type, one.last.output, one.rewards) == expected[name]
        assert one.order[:2] == ["preparing", "running"]
        assert one.spans[-1].name == f"invoke_agent kinds_{processes}:{agent}"
        assert error is None or error.type in error.stack
    if agent == "agent":
        raised = ended["raises"]
        assert raised.last.error is not None
        assert raised.last.error.message == "'no such tool'"
        assert f"kinds_{processes}.py" in raised.last.error.stack
        assert (raised.spans[0].name, raised.spans[1].status) == ("before", "Error")


@MODES
async def test_an_agent_gets_its_resources_and_rollout_if_it_asks(tmp_path: Path, processes: int) -> None:
    folder = write_agent(tmp_path, KINDS_OF_AGENT, f"kinds_{processes}.py")
    settings = settings_for_tests()
    log = MemoryLog(settings.topics)
    resources = Resources(
        resources_id=new_id(),
        experiment_id="",
        items={"policy": LLM(model="m", model_version="r.0.7"), "ask": PromptTemplate(template="{q}?"), "mine": [1]},  # type: ignore[dict-item]
    )
    await publish_resources(log.producer(), settings.topics, resources)
    options: dict[str, Any] = {"log": log, "settings": settings, "processes": processes}
    async with running(f"kinds_{processes}:asks", folder, **options) as rig:
        await rig.publish([{"a": 1}], mode="val", metadata={"k": "v"})
        (one,) = (await rig.ends(1)).values()
    assert one.last.output is not None
    assert json.loads(one.last.output) == ["val", 1, {"a": 1}, {"k": "v"}, "x?", "r.0.7", [1]]
    assert one.task.resources_id == resources.resources_id
    async with running(f"kinds_{processes}:not_told", folder, processes=processes) as rig:
        await rig.publish([0])
        (one,) = (await rig.ends(1)).values()
    assert one.last.output == "[]"


CROWD = """
    import asyncio, threading, time
    from concurrent.futures import ThreadPoolExecutor
    import millstream as ms

    pool = ThreadPoolExecutor(4)
    pool.submit(int).result()
    barrier = threading.Barrier(25)

    def emit(input, where):
        ms.emit_span(where, {"input": input})

    async def async_agent(input, *, rollout):
        emit(input, "loop")
        await asyncio.sleep(0.05)  # all of them are in here together
        await asyncio.gather(asyncio.to_thread(emit, input, "thread"), asyncio.create_task(later(input)))
        await asyncio.wrap_future(pool.submit(emit, input, "executor"))
        ms.emit_reward(input)
        return rollout.rollout_id

    async def later(input):
        await asyncio.sleep(0.001)
        emit(input, "task")

    def sync_agent(input, *, rollout):
        barrier.wait(20)
        emit(input, "loop")
        pool.submit(emit, input, "executor").result()
        thread = threading.Thread(target=emit, args=(input, "thread"))
        thread.start()
        thread.join()
        asyncio.run(later(input))
        ms.emit_reward(input)
        return rollout.rollout_id
"""


@pytest.mark.parametrize(("processes", "concurrency"), [(0, 50), (1, 50), (2, 25)])
@pytest.mark.parametrize("name", ["async_agent", "sync_agent"])
async def test_fifty_at_a_time_and_every_span_is_its_own(
    tmp_path: Path, processes: int, concurrency: int, name: str
) -> None:
    folder = write_agent(tmp_path, CROWD, f"crowd_{processes}_{name}.py")
    settings = settings_for_tests()
    rig = Rig(MemoryLog(settings.topics), settings)
    await rig.publish(range(50))
    options: dict[str, Any] = {"processes": processes, "concurrency": concurrency, "log": rig.log, "settings": settings}
    async with running(f"crowd_{processes}_{name}:{name}", folder, **options):
        ended = await rig.ends(50)
    assert_whole(ended)
    assert len(ended) == 50
    for text, one in ended.items():
        assert one.last.status == "succeeded", one.last.error
        assert one.last.output == f'"{one.task.rollout_id}"'
        assert one.rewards == [float(text)]
        assert sorted(s.name for s in one.spans if s.kind == "span") == ["executor", "loop", "task", "thread"]
        assert {s.attributes["input"] for s in one.spans if s.kind == "span"} == {text}
        assert len({s.trace_id for s in one.spans}) == 1
    starts = [next(s.start for s in one.spans if s.kind == "agent") for one in ended.values()]
    first_end = min(next(s.end for s in one.spans if s.kind == "agent") for one in ended.values())
    assert sum(start < first_end for start in starts) >= 25  # they did run at the same time


async def test_in_memory_spans_are_never_encoded() -> None:
    async with running(lambda question: 1.0) as rig:
        await rig.publish([1])
        await rig.ends(1)
    spans = [r for r in rig.records if r.headers["kind"] in (b"agent", b"reward")]
    assert len(spans) == 2
    assert all(isinstance(r.value, Span) and r.key == r.value.rollout_id for r in spans)


async def test_headers_hold_the_kind_and_the_key_is_the_rollout(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, KINDS_OF_AGENT, "kinds_h.py")
    async with running("kinds_h:sync_number", folder, processes=1) as rig:
        (task,) = await rig.publish([1])
        await rig.ends(1)
    assert [r.headers["kind"].decode() for r in rig.records] == [
        "preparing",
        "running",
        "span",
        "reward",
        "agent",
        "succeeded",
    ]
    assert {r.key for r in rig.records} == {task.rollout_id}


@MODES
@pytest.mark.parametrize(
    ("agent", "why"),
    [
        ("no_such_module:agent", "No module named 'no_such_module'"),
        ("kinds_bad:nobody", "kinds_bad has no nobody"),
        ("kinds_bad:NOT_CALLABLE", "not callable"),
        ("kinds_bad", "module:attribute"),
        ("broken_agent:agent", "ZeroDivisionError"),
    ],
)
async def test_an_agent_that_does_not_import_is_named(tmp_path: Path, processes: int, agent: str, why: str) -> None:
    folder = write_agent(tmp_path, KINDS_OF_AGENT, "kinds_bad.py")
    write_agent(tmp_path, "1 / 0", "broken_agent.py")
    with pytest.raises(ConfigError) as raised:
        async with running(agent, folder, processes=processes):
            pass
    assert f"agent '{agent}'" in str(raised.value)
    assert why in str(raised.value)


@MODES
async def test_an_input_that_is_not_json_fails_its_attempt_only(tmp_path: Path, processes: int) -> None:
    folder = write_agent(tmp_path, "def agent(input): return input", f"echo_{processes}.py")
    async with running(f"echo_{processes}:agent", folder, processes=processes) as rig:
        await rig.publish_tasks([task(input="{"), task(input="[1]")])
        ended = await rig.ends(2)
    assert ended["{"].last.status == "failed"
    assert ended["{"].last.error is not None
    assert ended["{"].last.error.type == "JSONDecodeError"
    assert (ended["[1]"].last.status, ended["[1]"].last.output) == ("succeeded", "[1]")


SLOW = """
    import asyncio, time
    import millstream as ms

    async def asleep(input):
        ms.emit_span("began")
        await asyncio.sleep(input)
        return 1.0

    def blocked(input):
        ms.emit_span("began")
        time.sleep(input)
        return 1.0

    async def stubborn(input):
        for _ in range(100):
            try:
                await asyncio.sleep(input)
            except asyncio.CancelledError:
                pass

    async def blocks_the_loop(input):
        ms.emit_span("began")
        time.sleep(input)
        return 1.0
"""


@MODES
@pytest.mark.parametrize("name", ["asleep", "blocked", "stubborn", "blocks_the_loop"])
async def test_a_time_out_ends_the_attempt_whatever_the_agent_does(tmp_path: Path, processes: int, name: str) -> None:
    folder = write_agent(tmp_path, SLOW, f"slow_{processes}_{name}.py")
    options: dict[str, Any] = {"processes": processes, "concurrency": 1, "policy": RunnerPolicy(cancel_grace_s=0.2)}
    async with running(f"slow_{processes}_{name}:{name}", folder, **options) as rig:
        await rig.publish([60], timeout_s=0.3)
        (one,) = (await rig.ends(1)).values()
        assert one.last.status == "timeout"
        assert one.last.error is not None
        assert one.last.error.message == "the agent ran for longer than 0.3 s"
        if name == "asleep":
            assert "await asyncio.sleep(input)" in one.last.error.stack  # where it was
        assert one.last.span_counts["agent"] == len(one.spans)
        if name != "blocks_the_loop" or processes:  # the slot is free again
            await rig.publish([0], timeout_s=20)
            ended = await rig.ends(2)
            if name != "stubborn":
                assert ended["0"].last.status == "succeeded"


async def test_heartbeats_go_on_while_the_agent_blocks_its_own_loop(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, SLOW, "slow_beat.py")
    async with running("slow_beat:blocks_the_loop", folder, processes=1) as rig:
        await rig.publish([1.0], lease_s=0.3)
        (one,) = (await rig.ends(1)).values()
    assert one.last.status == "succeeded"
    assert one.order.count("running") >= 8
    assert {e.lease_s for e in one.events} == {0.3}


class SilentLog:
    """A log that acknowledges no heartbeat while it is silent."""

    def __init__(self, inner: MemoryLog) -> None:
        self.inner = inner
        self.silent = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def producer(self) -> Any:
        producer = self.inner.producer()
        send = producer.send

        def maybe(topic: str, value: Any, *, on_ack: OnAck | None = None, **options: Any) -> None:
            if self.silent.is_set() and isinstance(value, AttemptEvent) and value.status == "running":
                return
            send(topic, value, on_ack=on_ack, **options)

        producer.send = maybe  # type: ignore[method-assign]
        return producer


@MODES
async def test_without_acknowledged_heartbeats_a_runner_ends_its_own_attempts(tmp_path: Path, processes: int) -> None:
    folder = write_agent(tmp_path, SLOW, f"slow_fence_{processes}.py")
    settings = settings_for_tests()
    log = SilentLog(MemoryLog(settings.topics))
    options: dict[str, Any] = {"processes": processes, "log": log, "settings": settings}
    async with running(f"slow_fence_{processes}:asleep", folder, **options) as rig:
        await rig.publish([60], lease_s=0.5)
        await rig.read_until(lambda events: any(isinstance(e, AttemptEvent) and e.status == "running" for e in events))
        log.silent.set()
        (one,) = (await rig.ends(1)).values()
    assert one.last.status == "lost"
    assert one.last.error is not None
    assert "longer than its lease of 0.5 s" in one.last.error.message


class UnansweringLog:
    """A log that stores everything, and acknowledges nothing while it is silent. ``beats``: times of heartbeats;
    ``beaten``: there were a dozen."""

    def __init__(self, inner: MemoryLog) -> None:
        self.inner = inner
        self.silent = False
        self.beats: list[float] = []
        self.beaten = asyncio.Event()
        self.unanswered: list[OnAck] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def producer(self) -> Any:
        producer = self.inner.producer()
        send = producer.send

        def later(topic: str, value: Any, *, on_ack: OnAck | None = None, **options: Any) -> None:
            if isinstance(value, AttemptEvent) and value.status == "running":
                self.beats.append(time.monotonic())
                if len(self.beats) == 12:
                    self.beaten.set()
            if self.silent and on_ack is not None:
                self.unanswered.append(on_ack)
                on_ack = None
            send(topic, value, on_ack=on_ack, **options)

        producer.send = later  # type: ignore[method-assign]
        return producer


async def test_an_end_that_the_log_does_not_take_is_waited_for_with_as_few_heartbeats_as_ever() -> None:
    settings = settings_for_tests()
    log = UnansweringLog(MemoryLog(settings.topics))

    async def agent(_task: Any) -> float:
        log.silent = True
        ms.emit_message("the last span")
        return 1.0

    options: dict[str, Any] = {"log": log, "settings": settings}
    async with running(agent, **options) as rig:
        await rig.publish([0], lease_s=0.3)
        await log.beaten.wait()
        log.silent = False
        for on_ack in log.unanswered:
            on_ack(None, 0)
        (one,) = (await rig.ends(1)).values()
    assert one.last.status == "succeeded"
    assert log.beats[11] - log.beats[1] > 0.8  # ten of them, a tenth of a second apart


@MODES
async def test_a_stop_waits_for_running_attempts_and_ends_the_rest_as_lost(tmp_path: Path, processes: int) -> None:
    folder = write_agent(tmp_path, SLOW, f"slow_stop_{processes}.py")
    options: dict[str, Any] = {"processes": processes, "concurrency": 2, "drain_s": 1.5}
    async with running(f"slow_stop_{processes}:asleep", folder, **options) as rig:
        await rig.publish([0.5, 60])
        await rig.read_until(lambda events: sum(isinstance(e, Span) for e in events) >= 2)
        await rig.publish([61])  # never claimed: there is no free slot before the stop
    ended = by_input(await rig.everything())
    assert {text: one.last.status for text, one in ended.items()} == {"0.5": "succeeded", "60": "lost"}
    assert_whole(ended)
    assert ended["60"].last.error is not None
    assert ended["60"].last.error.type == "stopped"


class StayLog(MemoryLog):
    """Sets ``stayed`` once its runner's consumer has polled three times for nothing, which keeps it in its group."""

    stayed: asyncio.Event

    def consumer(self, group: str | None = None, **options: Any) -> Any:
        consumer = super().consumer(group, **options)
        if group is not None:
            poll, polls = consumer.poll, count(1)

            async def counted(max_records: int, timeout_s: float, topics: Any = None) -> Any:
                if topics == () and next(polls) == 3:
                    self.stayed.set()
                return await poll(max_records, timeout_s, topics)

            consumer.poll = counted
        return consumer


async def test_a_full_runner_stays_in_its_group() -> None:
    settings = settings_for_tests()
    log, go = StayLog(settings.topics), threading.Event()
    log.stayed = asyncio.Event()
    options: dict[str, Any] = {"concurrency": 1, "policy": RunnerPolicy(stay_s=0.05)}
    async with running(lambda task: go.wait(30), log=log, settings=settings, **options) as rig:
        await rig.publish([1, 2])
        await asyncio.wait_for(log.stayed.wait(), 30)
        assert len([e for e in await rig.everything() if isinstance(e, AttemptEvent) and e.task]) == 1  # no slot
        go.set()
        ended = await rig.ends(2)
    assert [one.last.output for one in ended.values()] == ["true", "true"]


@asynccontextmanager
async def proxy(answer: Callable[[web.Request], Any]) -> AsyncIterator[str]:
    async def close(request: web.Request) -> web.StreamResponse:
        found: web.StreamResponse = answer(request)
        return found

    app = web.Application()
    app.add_routes([web.post("/rollout/{rollout}/attempt/{attempt}/close", close)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_an_attempt_is_closed_at_its_proxy_and_both_counts_are_written() -> None:
    asked: list[tuple[str, str, str]] = []

    def answer(request: web.Request) -> web.Response:
        asked.append((request.match_info["rollout"], request.match_info["attempt"], request.headers["Authorization"]))
        return web.json_response({"spans": 5})

    async with proxy(answer) as url:
        settings = settings_for_tests(proxy_url=url, proxy_secret=SecretStr("s" * 32))
        async with running(lambda question: None, settings=settings) as rig:
            await rig.publish([1], seed=11)
            (one,) = (await rig.ends(1)).values()
    rollout_id, attempt_id = one.task.rollout_id, one.last.attempt_id
    ((*ids, key),) = asked
    assert ids == [rollout_id, attempt_id]
    claims = claims_of("s" * 32, rollout_id, attempt_id, key.removeprefix("Bearer "))
    assert claims.expires >= claims.issued + one.task.timeout_s
    assert claims.seed == 11
    assert one.last.span_counts == {"agent": 1, "proxy": 5}


async def test_an_attempt_that_can_not_be_closed_is_lost() -> None:
    def answer(request: web.Request) -> web.Response:
        return web.Response(status=503, text="the log does not answer")

    async with proxy(answer) as url:
        settings = settings_for_tests(proxy_url=url)
        async with running(lambda question: 1.0, settings=settings) as rig:
            await rig.publish([1])
            (one,) = (await rig.ends(1)).values()
    assert one.last.status == "lost"
    assert one.last.error is not None
    assert "could not be closed at the proxy" in one.last.error.message
    assert "503" in one.last.error.message
    assert one.last.output is None


@MODES
async def test_a_span_too_large_for_the_log_fails_its_attempt_and_leaves_a_dead_letter(
    tmp_path: Path, processes: int
) -> None:
    code = """
        import millstream as ms
        def agent(input):
            ms.emit_span("big", {"x": "x" * input})
            return 1.0
    """
    folder = write_agent(tmp_path, code, f"big_{processes}.py")
    settings = settings_for_tests()
    log = MemoryLog(settings.topics, encode=True, max_record_bytes=4000)
    options: dict[str, Any] = {"processes": processes, "log": log, "settings": settings}
    async with running(f"big_{processes}:agent", folder, **options) as rig:
        await rig.publish([5000, 10])
        ended = await rig.ends(2)
    assert ended["10"].last.status == "succeeded"
    one = ended["5000"]
    assert one.last.status == "failed"
    assert one.last.error is not None
    assert one.last.error.type == "too_large"
    assert one.last.span_counts["agent"] == len(one.spans) == 2
    letters = [codec.decode_as(DeadLetter, r.value) for r in log.partitions[settings.topics.dead][0].records]
    assert [(letter.reason, letter.key) for letter in letters] == [("too_large", one.task.rollout_id.encode())]


async def test_a_result_that_is_too_large_fails_its_attempt() -> None:
    settings = settings_for_tests()
    log = MemoryLog(settings.topics, encode=True, max_record_bytes=4000)
    async with running(lambda question: "x" * 5000, log=log, settings=settings) as rig:
        await rig.publish([1])
        (one,) = (await rig.ends(1)).values()
    assert one.last.error is not None
    assert (one.last.status, one.last.error.type) == ("failed", "too_large")


async def test_resources_that_do_not_exist_fail_the_attempt_by_name() -> None:
    missing = new_id()
    async with running(lambda question: 1.0) as rig:
        await rig.publish([1], resources_id=missing)
        (one,) = (await rig.ends(1)).values()
    assert one.order == ["preparing", "failed"]
    assert one.last.error is not None
    assert missing in one.last.error.message


async def test_a_task_of_another_agent_ends_with_an_error_that_names_both(tmp_path: Path) -> None:
    """Entry C5: two agents in one deployment. Its own tasks, and those that name none, run."""
    folder = write_agent(tmp_path, "def agent(input):\n    return 1.0\n", "mine.py")
    async with running("mine:agent", folder) as rig:
        for name in ("mine:agent", "other:agent", None):
            await rig.publish([name], agent=name)
        found = {json.loads(ended.task.input): ended for ended in (await rig.ends(3)).values()}
    assert [found[name].last.status for name in ("mine:agent", None)] == ["succeeded", "succeeded"]
    refused = found["other:agent"].last
    assert refused.status == "failed"
    assert refused.error is not None
    assert "is for agent other:agent, but this runner runs mine:agent" in refused.error.message
    assert "topic_prefix" in refused.error.message
