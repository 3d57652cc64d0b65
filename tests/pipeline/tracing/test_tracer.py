"""`ms.Tracer`: an agent with its reward functions, traced with and without a runner."""

import asyncio
import logging
import struct
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest
from factories import task
from policy_server import PolicyServer, ids

import millstream as ms
from millstream.consumers.adapter.adapter import Adapter
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutEnd, Span

ANYWHERE = "http://127.0.0.1:0"


def settings(**overrides: Any) -> Settings:
    return load_settings(**{"topic_prefix": "t", "kafka_partitions": 2, **overrides})


def shout(question: dict[str, Any]) -> str:
    ms.emit_span("thought", {"about": question})
    return str(question["word"]).upper()


async def shout_async(question: dict[str, Any], rollout: Any) -> str:
    await asyncio.sleep(0)
    ms.emit_span("thought", {"mode": rollout.mode})
    return str(question["word"]).upper()


@pytest.fixture(params=[shout, shout_async])
def tracer(request: pytest.FixtureRequest) -> ms.Tracer:
    """With a reward function of each kind."""
    tracer = ms.Tracer(request.param, settings=settings())

    @tracer.on_completion
    def correct(result: str, rollout: Any) -> float:
        return float(result == rollout.input["answer"])

    @tracer.on_completion
    async def judged(result: str, *, spans: Sequence[Span]) -> dict[str, float]:
        await asyncio.sleep(0)
        return {"short": 1 / len(result), "thoughts": sum(span.name == "thought" for span in spans)}

    @tracer.on_completion
    def silent(result: str) -> None:
        pass

    return tracer


GIVEN = {"word": "no", "answer": "NO"}
REWARDS = [("correct", 1.0), ("short", 0.5), ("thoughts", 1.0)]


def run(tracer: ms.Tracer, question: Any) -> Any:
    result = tracer(question)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


def test_a_trace_without_a_runner(tracer: ms.Tracer) -> None:
    with tracer.trace(GIVEN) as trace:
        assert run(tracer, trace.rollout.input) == "NO"
    assert (trace.result, trace.status) == ("NO", "succeeded")
    with pytest.raises(MillstreamError, match="entered only once"), trace:
        pass
    assert [(r.name, r.value) for r in trace.rewards] == REWARDS
    assert [s.name for s in trace.spans] == [
        "thought",
        "correct",
        "short",
        "thoughts",
        f"invoke_agent {__name__}:{tracer.__name__}",  # type: ignore[attr-defined]
    ]
    assert {s.parent_id for s in trace.spans[:-1]} == {trace.spans[-1].span_id}
    assert {s.rollout_id for s in trace.spans} == {trace.rollout.rollout_id}


async def test_in_a_notebook_a_loop_is_running(tracer: ms.Tracer) -> None:
    """Reward functions that have to be awaited, and the log, are waited for by a plain ``with``, too."""
    with tracer.trace(GIVEN) as trace:
        result = tracer(GIVEN)
        assert (await result if asyncio.iscoroutine(result) else result) == "NO"
    assert [(r.name, r.value) for r in trace.rewards] == REWARDS
    async with tracer.trace(GIVEN) as trace:
        result = tracer(GIVEN)
        assert (await result if asyncio.iscoroutine(result) else result) == "NO"
    assert [(r.name, r.value) for r in trace.rewards] == REWARDS


async def test_traces_at_once_and_within_each_other() -> None:
    tracer = ms.Tracer(shout_async, settings=settings())

    @tracer.on_completion
    def length(result: str) -> int:
        return len(result)

    async def one(n: int) -> ms.TracedRollout:
        async with tracer.trace({"word": "x" * n}) as outer:
            async with tracer.trace({"word": "x" * 2 * n}) as inner:
                await tracer(inner.rollout.input)
            await tracer(outer.rollout.input)
        assert [r.value for r in inner.rewards] == [2 * n]
        assert inner.rollout.rollout_id != outer.rollout.rollout_id
        return outer

    traces = await asyncio.gather(*(one(n) for n in range(1, 21)))
    assert [[r.value for r in trace.rewards] for trace in traces] == [[n] for n in range(1, 21)]
    assert all(len(trace.spans) == 3 for trace in traces)

    threads = [threading.Thread(target=lambda: asyncio.run(one(3))) for _ in range(5)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)


def test_an_exception_ends_the_trace_as_failed_and_propagates(tracer: ms.Tracer) -> None:
    trace = tracer.trace(GIVEN)
    with pytest.raises(KeyError), trace:
        run(tracer, {})
    assert (trace.status, trace.result, trace.rewards) == ("failed", None, [])
    assert [s.name for s in trace.spans[:-1]] == ["thought"]
    assert (trace.spans[-1].status, trace.spans[-1].events[0].name) == ("Error", "exception")

    @tracer.on_completion
    def broken(result: str) -> float:
        raise LookupError("no such judge")

    trace = tracer.trace(GIVEN)
    with pytest.raises(LookupError, match="no such judge"), trace:
        run(tracer, GIVEN)
    assert (trace.status, len(trace.rewards)) == ("failed", 3)


async def test_cancelled() -> None:
    tracer = ms.Tracer(shout, settings=settings())
    trace = tracer.trace()
    entered = asyncio.Event()

    async def body() -> None:
        async with trace:
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trace.status == "cancelled"


def test_a_result_set_by_hand_is_rewarded_at_the_end_and_none_is_a_warning(
    tracer: ms.Tracer, caplog: pytest.LogCaptureFixture
) -> None:
    with tracer.trace(GIVEN) as trace:
        trace.result = "NO"
        ms.emit_span("thought")
    assert [(r.name, r.value) for r in trace.rewards] == REWARDS
    with caplog.at_level(logging.WARNING), tracer.trace(GIVEN) as trace:
        pass
    assert (trace.rewards, trace.status) == ([], "succeeded")
    (warning,) = [r.message for r in caplog.records]
    assert "there is no result for the reward functions" in warning


def test_a_returned_number_is_the_reward_as_in_a_runner() -> None:
    tracer = ms.Tracer(lambda question: 0.25, settings=settings())
    with tracer.trace("q") as trace:
        tracer("q")
    assert [(r.name, r.value) for r in trace.rewards] == [("reward", 0.25)]


async def test_an_adapter_settles_traces(tracer: ms.Tracer) -> None:
    """However short the lease is: a trace has no heartbeats."""
    of = task(input='{"word": "no", "answer": "NO"}', lease_s=0.01)
    log, topics = tracer.log, tracer.settings.topics
    adapter, stop = Adapter(log, topics, transactional_id="a"), asyncio.Event()
    running = asyncio.create_task(adapter.run(stop))
    async with tracer.trace(of) as trace:
        await asyncio.wait_for(adapter.wait_ready(), 30)
        result = tracer(trace.rollout.input)
        _ = await result if asyncio.iscoroutine(result) else result
    failed = tracer.trace(GIVEN)
    with pytest.raises(ValueError, match="no"), failed:
        raise ValueError("no")
    consumer = log.consumer()
    await consumer.assign([Partition(topics.triplets, n) for n in range(topics.partitions)])
    ends: dict[str, RolloutEnd] = {}
    async with asyncio.timeout(30):
        while len(ends) < 2:
            for record in await consumer.poll(10, 30.0):
                end = codec.decode_as(RolloutEnd, record.value)  # type: ignore[union-attr]
                ends[end.rollout_id] = end
    stop.set()
    await running
    await consumer.close()
    good, bad = ends[of.rollout_id], ends[failed.rollout.rollout_id]
    assert (good.status, good.reward, good.spans) == ("succeeded", 2.5, len(trace.spans))
    assert (bad.status, bad.reason) == ("failed", "failed: ValueError: no")


async def test_through_the_proxy_its_calls_become_triplets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "")  # the tracer sets them
    configured = settings(proxy_secret="s" * 32)

    async def ask(question: str) -> str | None:
        async with openai.AsyncOpenAI() as client:
            messages: Any = [{"role": "user", "content": question}]
            answer = await client.chat.completions.create(model="policy", messages=messages)
        return answer.choices[0].message.content

    log = ms.Tracer(ask, settings=configured).log
    async with AsyncExitStack() as stack:
        model_url = await stack.enter_async_context(serve(PolicyServer().app, ANYWHERE))
        proxy = Proxy(log, configured.model_copy(update={"model_url": model_url}))
        url = await stack.enter_async_context(serve(proxy.app, ANYWHERE))
        tracer = ms.Tracer(ask, log=log, settings=configured, proxy_url=url)
        tracer.on_completion(lambda result: {"right": float(result == "hi")})
        async with tracer.trace("hi") as trace:
            assert await tracer("hi") == "hi"
    (triplet,) = trace.triplets
    assert (triplet.trainable, triplet.reason, triplet.reward) == (True, None, 1.0)
    assert triplet.prompt_token_ids == struct.pack("<2i", *ids("user hi"))
    assert triplet.response_token_ids == struct.pack("<i", *ids("hi"))
    assert {s.source for s in trace.spans} == {"agent", "proxy"}
    lost = tracer.trace("hi")
    async with lost:
        lost.result = "add"
    assert lost.status == "lost"
    ours = [r for r in caplog.records if r.name.startswith("millstream.pipeline.tracing")]
    (warning,) = [r.message for r in ours if r.levelname == "WARNING"]
    assert "could not be closed at the proxy" in warning


def test_a_trainer_takes_it_as_its_runner(tracer: ms.Tracer, tmp_path: Any) -> None:
    (finished,) = ms.Trainer(runner=tracer, run_dir=tmp_path).dev([GIVEN])
    assert (finished.end.status, finished.end.reward) == ("succeeded", 2.5)
    with pytest.raises(ConfigError, match="give one of them"):
        ms.Trainer(runner=tracer, agent=shout, run_dir=tmp_path)


async def test_a_trainer_in_a_notebook(tracer: ms.Tracer, tmp_path: Any) -> None:
    (finished,) = ms.Trainer(runner=tracer, run_dir=tmp_path).dev([GIVEN])
    assert (finished.end.status, finished.end.reward) == ("succeeded", 2.5)


def test_a_tracer_needs_a_callable() -> None:
    with pytest.raises(ConfigError, match="a tracer needs a callable agent, not 'm:agent'"):
        ms.Tracer("m:agent")  # type: ignore[arg-type]
