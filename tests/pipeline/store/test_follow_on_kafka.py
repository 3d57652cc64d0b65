"""The spans of a rollout, live from a real log."""

import asyncio

import factories
import pytest

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.schemas.wire import status
from millstream.schemas.wire.records import RolloutEnd

pytestmark = pytest.mark.kafka


@pytest.fixture
def settings(kafka_settings, folder):
    return kafka_settings(clickhouse_dsn=f"chdb://{folder}")


async def test_spans_arrive_while_the_rollout_runs(settings, store):
    log = KafkaLog(settings)
    await log.create_topics()
    producer = log.producer()
    task, other = factories.task(), factories.task()
    spans = [factories.span(task, "a", sequence=n) for n in range(3)]

    def send(*values):
        for value in values:
            producer.send(settings.topics.events, value, key=value.rollout_id)
        producer.flush(10)

    try:
        send(factories.event(task, "a", status.PREPARING), factories.span(other, "b"), spans[0])
        followed = store.follow(task.rollout_id)
        assert await asyncio.wait_for(anext(followed), 20) == spans[0]
        send(spans[1])
        assert await asyncio.wait_for(anext(followed), 20) == spans[1]
        end = {"group_id": "g", "group_size": 1, "status": "succeeded", "attempts": 1, "created_at": 1, "ended_at": 2}
        send(spans[2], RolloutEnd(rollout_id=task.rollout_id, **end))
        assert [span async for span in followed] == spans[2:]
    finally:
        await asyncio.to_thread(producer.close)
