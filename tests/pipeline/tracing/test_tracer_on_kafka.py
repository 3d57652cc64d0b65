"""`ms.Tracer` without a runner, on a real log."""

import asyncio

import pytest

import millstream as ms
from millstream.consumers.log.kafka_log import KafkaLog

pytestmark = pytest.mark.kafka


def agent(question):
    ms.emit_span("thought")
    return len(question)


async def test_a_trace_is_in_kafka_once_it_has_been_left(kafka_settings):
    settings = kafka_settings()
    await KafkaLog(settings).create_topics()
    tracer = ms.Tracer(agent, log="kafka", settings=settings)
    tracer.on_completion(lambda result: {"length": result})

    async def one(question):
        async with tracer.trace(question) as trace:
            tracer(question)
        return trace

    for trace, n in zip(await asyncio.gather(one("a"), one("bb"), one("ccc")), (1, 2, 3), strict=True):
        assert (trace.status, trace.result, [r.value for r in trace.rewards]) == ("succeeded", n, [n])
        assert [s.kind for s in trace.spans] == ["span", "reward", "agent"]
    with tracer.trace("dddd") as trace:  # while a loop runs here
        tracer("dddd")
    assert [r.value for r in trace.rewards] == [4]
