"""Without its log the proxy answers no call: an answer that is not recorded would be a hole in the training data."""

import asyncio

import openai
import pytest
from proxy_rig import rig_of

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.proxy.app import ProxyPolicy

pytestmark = pytest.mark.kafka
ASKED = {"model": "policy", "messages": [{"role": "user", "content": "say one two three"}]}


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
