"""How many tasks wait: records, not offsets."""

import asyncio
import time
from collections.abc import Callable

import pytest
from factories import event, task

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Log
from millstream.consumers.unclaimed import UnclaimedTasks
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.config.settings import Settings
from millstream.schemas.wire.topics import Topics

NONE = {"high": 0, "normal": 0, "low": 0}


async def claim(log: Log, topics: Topics, priority: str, most: int) -> int:
    """Reads and commits tasks as a runner does. Returns how many there were."""
    consumer = log.consumer(f"{topics.prefix}.runner")
    await consumer.subscribe([topics.tasks(priority)])
    found = 0
    async with asyncio.timeout(20):
        while found < most:
            batch = await consumer.poll(most - found, 0.1)
            found += len(batch)
            await consumer.commit({record.partition: record.offset + 1 for record in batch})
    await consumer.close()
    return found


async def test_tasks_are_counted_by_priority_and_age_and_each_is_read_once() -> None:
    topics = Topics("t", 2)
    log = MemoryLog(topics, encode=True)
    waiting = UnclaimedTasks(log, topics)
    assert (await waiting.read()).tasks == NONE
    assert (await waiting.read()).oldest_s == 0
    producer, before = log.producer(), time.time()
    for n in range(5):
        producer.send(topics.tasks("normal"), task(input=str(n)))
    producer.send(topics.tasks("low"), task())
    found = await waiting.read()
    assert found.tasks == {"high": 0, "normal": 5, "low": 1}
    assert 0 <= found.oldest_s <= time.time() - before + 0.002
    assert await claim(log, topics, "normal", 3) == 3
    assert (
        (await waiting.read()).tasks
        == (await UnclaimedTasks(log, topics).read()).tasks
        == {"high": 0, "normal": 2, "low": 1}
    )
    assert await claim(log, topics, "normal", 2) == 2
    assert await claim(log, topics, "low", 1) == 1
    assert (await waiting.read()).tasks == NONE


async def test_markers_and_aborted_records_are_no_tasks() -> None:
    topics = Topics("t", 1)
    log = MemoryLog(topics, encode=True)
    waiting = UnclaimedTasks(log, topics)
    producer = log.transactional_producer("p")
    producer.init_transactions(1.0)
    for commits in (True, False, True, False):
        producer.begin_transaction()
        producer.send(topics.tasks("normal"), task())
        await asyncio.to_thread(producer.commit_transaction if commits else producer.abort_transaction, 1.0)
    assert (await waiting.read()).tasks["normal"] == (await UnclaimedTasks(log, topics).read()).tasks["normal"] == 2
    assert await claim(log, topics, "normal", 2) == 2
    assert (await waiting.read()).tasks == (await UnclaimedTasks(log, topics).read()).tasks == NONE


@pytest.mark.kafka
async def test_nothing_waits_once_all_retries_are_claimed(kafka_settings: Callable[..., Settings]) -> None:
    """Defect 2: each retry's transaction leaves a marker that no runner ever reads."""
    settings = kafka_settings()
    topics, log = settings.topics, KafkaLog(settings)
    await log.create_topics()
    waiting, producer, stop = UnclaimedTasks(log, topics), log.producer(), asyncio.Event()
    adapter = Adapter(log, topics, transactional_id=f"{topics.prefix}.adapter.0")
    running = asyncio.create_task(adapter.run(stop))
    for _ in range(15):
        of = task(max_attempts=2)
        for status in ("preparing", "failed"):
            await send_acknowledged(producer, topics.events, event(of, "a", status), key=of.rollout_id)
    async with asyncio.timeout(30):
        while (found := (await waiting.read()).tasks) != NONE | {"normal": 15}:
            assert found["normal"] < 15
    assert (await UnclaimedTasks(log, topics).read()).tasks == NONE | {"normal": 15}
    assert await claim(log, topics, "normal", 15) == 15
    assert (await waiting.read()).tasks == (await UnclaimedTasks(log, topics).read()).tasks == NONE
    stop.set()
    await running
    await asyncio.to_thread(producer.close)
