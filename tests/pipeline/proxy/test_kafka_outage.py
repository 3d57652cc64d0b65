"""Without its log the proxy answers no call: an answer that is not recorded would be a hole in the training data."""

import asyncio
import contextlib

import openai
import pytest
from proxy_rig import rig_of

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.addresses import free_port
from millstream.pipeline.proxy.app import ProxyPolicy
from millstream.producers.log.kafka import KafkaProducer, ProducerPolicy
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import BufferFull, LogUnavailable
from millstream.schemas.wire.topics import Topics

ASKED = {"model": "policy", "messages": [{"role": "user", "content": "say one two three"}]}


@pytest.mark.kafka
async def test_calls_fail_clearly_while_kafka_is_away_and_succeed_when_it_is_back(kafka_broker, kafka_settings):
    settings = kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    on_kafka = {"kafka_bootstrap_servers": settings.kafka_bootstrap_servers, "topic_prefix": settings.topic_prefix}
    async with rig_of(
        log, policy=ProxyPolicy(record_s=2.0), **on_kafka, kafka_partitions=settings.kafka_partitions
    ) as rig:
        await rig.client.chat.completions.create(**ASKED)
        await asyncio.to_thread(kafka_broker.down)
        try:
            with pytest.raises(openai.InternalServerError, match="could not be recorded"):
                await rig.client.chat.completions.create(**ASKED)
            with pytest.raises(openai.APIError, match="could not be recorded"):
                async for _ in await rig.client.chat.completions.create(**ASKED, stream=True):
                    pass
        finally:
            await asyncio.to_thread(kafka_broker.up)
        async with asyncio.timeout(60):
            patient = rig.client.with_options(max_retries=20)
            await patient.chat.completions.create(**ASKED)
        status, body = await rig.close_attempt()
        assert status == 200
        assert body["spans"] >= 4  # what failed is counted: the trace has to hold it, or the attempt is not trained on


class FullLog(MemoryLog):
    """Its producer is Kafka's, without a broker, and with room for one record."""

    def producer(self, *, room_s=None, **_):
        settings = load_settings(kafka_bootstrap_servers=f"127.0.0.1:{free_port()}", topic_prefix="t")
        wait = {} if room_s is None else {"buffer_wait_s": room_s}
        inner = KafkaProducer(settings, policy=ProducerPolicy(buffer_records=1, **wait))

        class Impatient:
            def close(self):
                with contextlib.suppress(LogUnavailable):
                    inner.close(0.1)

            def __getattr__(self, name):
                return getattr(inner, name)

        return Impatient()


async def test_with_a_full_buffer_calls_are_refused_at_once_and_the_loop_never_stands_still():
    """Entry B4: each call stopped the loop, and with it all others, for a minute."""
    gaps, loop = [0.0], asyncio.get_running_loop()

    async def beat():
        last = loop.time()
        while True:
            await asyncio.sleep(0.01)
            now = loop.time()
            gaps.append(now - last)
            last = now

    async with rig_of(FullLog(Topics("t", partitions=2)), policy=ProxyPolicy(record_s=1.0)) as rig:
        beating = asyncio.create_task(beat())
        first = asyncio.create_task(rig.client.chat.completions.create(**ASKED))
        await rig.model.asked.wait()  # its record takes the only place
        refused = []
        while len(refused) < 20 and not first.done():
            try:
                await rig.client.chat.completions.create(**ASKED)
            except openai.InternalServerError as error:
                refused.append(error)
        with pytest.raises(openai.InternalServerError, match="could not be recorded"):
            await first
        beating.cancel()
    assert len(refused) == 20  # before the first had waited for its acknowledgement
    assert {(error.status_code, error.response.headers["Retry-After"]) for error in refused} == {(503, "5")}
    assert "buffer" in str(refused[0])
    assert len(rig.model.requests) <= 3  # most of them did not reach the model
    assert max(gaps) < 1.0


async def test_there_is_room_again_when_a_record_has_left_the_buffer():
    acks, room = [], [False]

    class SlowLog(MemoryLog):
        def producer(self, **_):
            inner = super().producer()

            class Slow:
                def send(self, *args, on_ack=None, **kwargs):
                    if not room[0]:
                        if acks:
                            raise BufferFull("the buffer is full")
                        acks.append(on_ack)
                        return
                    inner.send(*args, on_ack=on_ack, **kwargs)

                def __getattr__(self, name):
                    return getattr(inner, name)

            return Slow()

    async with rig_of(SlowLog(Topics("t", partitions=2))) as rig:
        first = asyncio.create_task(rig.client.chat.completions.create(**ASKED))
        await rig.model.asked.wait()
        for _ in range(3):
            with pytest.raises(openai.InternalServerError, match="could not be recorded"):
                await rig.client.chat.completions.create(**ASKED)
        room[0] = True
        acks[0](None, 0)
        await first
        await rig.client.chat.completions.create(**ASKED)
        assert len(rig.model.requests) == 3  # of the three refused, one had been asked
