"""Where reading goes on: what retention deletes before it is read is named and counted (entry C7), and nothing else is
skipped or read again (entry C1)."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka.consumer.group_coordinator import GroupCoordinator
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from factories import task

from millstream.consumers.log.kafka import place_to_continue
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.producers.log.acks import Acks
from millstream.schemas.config.settings import Settings
from millstream.schemas.wire.log import LogRecord, Partition

pytestmark = pytest.mark.kafka


async def written(log: KafkaLog, partition: Partition, count: int) -> None:
    acks, producer = Acks(sender := log.producer()), sender
    for _ in range(count):
        acks.send(partition.topic, task(), partition=partition.number)
    await acks.wait()
    await asyncio.to_thread(producer.close)


async def read(consumer: Any, count: int) -> list[int]:
    """Offsets of the next records."""
    found: list[int] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            found += [item.offset for item in await consumer.poll(100, 0.2) if isinstance(item, LogRecord)]
    return found


def delete_before(settings: Settings, partition: Partition, offset: int) -> None:
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    for deleted in admin.delete_records([TopicPartition(*partition, offset)]).values():
        deleted.result(10)


@pytest.mark.parametrize("paused", [False, True], ids=["restarted", "running"])
@pytest.mark.parametrize("group", ["g", None])
async def test_a_consumer_names_and_counts_what_was_deleted_before_it_read_it(
    kafka_settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture, group: str | None, paused: bool
) -> None:
    settings = kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    partition = Partition(settings.topics.tasks("normal"), 2)
    await written(log, partition, 10)
    consumer = log.consumer(group)
    begin = consumer.subscribe([partition.topic]) if group else consumer.assign([partition])
    await begin
    assert await read(consumer, 10) == list(range(10))
    if group:
        await consumer.commit({partition: 4})
    consumer.pause([partition])
    await consumer.poll(1, 0)
    await written(log, partition, 20)
    delete_before(settings, partition, 25)
    if group and not paused:
        await consumer.close()
        consumer = log.consumer(group)
        await consumer.subscribe([partition.topic])
    else:
        await consumer.seek(partition, 4)
        consumer.resume([partition])
    with caplog.at_level(logging.ERROR):
        assert await read(consumer, 5) == list(range(25, 30))
    assert f"{partition}: offsets 4 to 24 were deleted" in caplog.text
    assert consumer.polls.unread == 21
    await consumer.close()


async def test_a_transactional_consumer_names_and_counts_it_too(
    kafka_settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    settings = kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    partition = Partition(settings.topics.events, 1)
    await written(log, partition, 10)
    first = log.consumer("t")
    await first.subscribe([partition.topic])
    assert await read(first, 10) == list(range(10))
    await first.commit({partition: 4})
    await first.close()
    delete_before(settings, partition, 7)
    consumer = log.transactional_consumer("t")
    await consumer.subscribe([partition.topic])
    with caplog.at_level(logging.ERROR):
        assert await read(consumer, 3) == [7, 8, 9]
    assert f"{partition}: offsets 4 to 6 were deleted" in caplog.text
    assert consumer.polls.unread == 3
    await consumer.close()


async def test_a_group_goes_on_where_it_committed_although_a_coordinator_that_loads_reports_nothing(
    kafka_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entry C1: a restarted broker answers so for a moment, too short to be hit at will. It is what aiokafka makes of
    an error of the whole group; tests/kafka/test_permissions_on_kafka.py has one from a real broker."""
    settings = kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    partition = Partition(settings.topics.tasks("normal"), 2)
    await written(log, partition, 10)
    consumer = log.consumer("g")
    await consumer.subscribe([partition.topic])
    assert await read(consumer, 10) == list(range(10))
    await consumer.commit({partition: 7})
    await consumer.close()

    async def nothing(*_: object) -> dict[Any, Any]:
        return {}

    monkeypatch.setattr(GroupCoordinator, "_do_fetch_commit_offsets", nothing)
    consumer = log.consumer("g")
    await consumer.subscribe([partition.topic])
    assert await read(consumer, 3) == [7, 8, 9]
    assert consumer.polls.unread == 0
    await consumer.close()


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_topic_that_was_created_again_is_read_from_its_beginning(
    kafka_settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture, transactional: bool
) -> None:
    settings = kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    partition = Partition(settings.topics.events, 1)
    await written(log, partition, 3)
    first = log.consumer("g")
    await first.subscribe([partition.topic])
    assert await read(first, 3) == [0, 1, 2]
    await first.commit({partition: 9})
    await first.close()
    consumer = log.transactional_consumer("g") if transactional else log.consumer("g")
    await consumer.subscribe([partition.topic])
    with caplog.at_level(logging.ERROR):
        assert await read(consumer, 3) == [0, 1, 2]
    assert f"{partition} ends at offset 3, but group g has read it up to 9" in caplog.text
    await consumer.close()


@pytest.mark.parametrize(
    ("wanted", "place", "unread"),
    [(-1001, 5, 0), (-1, 5, 0), (0, 5, 5), (4, 5, 1), (5, 5, 0), (8, 8, 0), (9, 9, 0), (10, 5, 0)],
)
def test_what_is_wanted_and_held_is_the_place_to_continue(wanted: int, place: int, unread: int) -> None:
    assert place_to_continue(Partition("t", 0), wanted, first=5, end=9, group="g") == (place, unread)
