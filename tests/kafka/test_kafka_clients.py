"""What only a real broker shows of the two clients."""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from aiokafka import AIOKafkaProducer

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.port import Consumer, TransactionalConsumer
from millstream.deploy.kafka.local import LocalKafka
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import LogUnavailable
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.topics import partition_of

MakeSettings = Callable[..., Settings]


both_clients = pytest.mark.parametrize("transactional", [False, True], ids=["aiokafka", "librdkafka"])


async def subscribed(log: KafkaLog, settings: Settings, transactional: bool) -> Consumer | TransactionalConsumer:
    """To the events, in a group."""
    group = f"{settings.topic_prefix}.team"
    consumer = log.transactional_consumer(group) if transactional else log.consumer(group)
    await consumer.subscribe([settings.topics.events])
    return consumer


async def read(consumer: Consumer | TransactionalConsumer, count: int, deadline_s: float = 60.0) -> list[LogRecord]:
    found: list[LogRecord] = []
    deadline = time.monotonic() + deadline_s
    while len(found) < count and time.monotonic() < deadline:
        found += [r for r in await consumer.poll(1000, 0.5) if isinstance(r, LogRecord)]
    return found


def events(settings: Settings) -> list[Partition]:
    return [Partition(settings.topics.events, n) for n in range(settings.kafka_partitions)]


@pytest.mark.kafka
async def test_both_clients_place_a_key_where_our_partitioner_says(kafka_settings: MakeSettings) -> None:
    settings = kafka_settings(kafka_partitions=8)
    log, topic = KafkaLog(settings), settings.topics.events
    await log.create_topics()
    keys = [f"rollout/{n}·ü" for n in range(1000)]
    producer = log.producer()
    for key in keys:
        producer.send(topic, b"librdkafka", key=key)
    producer.close(30.0)
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers) as other:
        for sent in [await other.send(topic, b"aiokafka", key=key.encode()) for key in keys]:
            await sent
    consumer = log.consumer()
    await consumer.assign(events(settings))
    found = await read(consumer, 2000)
    await consumer.close()
    expected = Counter({(key, partition_of(key, 8)): 2 for key in keys})
    assert Counter((r.key, r.partition.number) for r in found) == expected


@pytest.mark.kafka
async def test_records_without_a_key_go_round_the_partitions(kafka_settings: MakeSettings) -> None:
    settings = kafka_settings()
    log, topic = KafkaLog(settings), settings.topics.tasks("normal")
    await log.create_topics()
    producer = log.producer()
    for _ in range(8 * 4):
        producer.send(topic, b"task")
    producer.close(30.0)
    consumer = log.consumer()
    ends = await consumer.end_offsets(Partition(topic, n) for n in range(4))
    assert set(ends.values()) == {8}


@pytest.mark.kafka
@both_clients
async def test_a_record_of_the_largest_size_passes_and_its_neighbour_too(
    kafka_settings: MakeSettings, transactional: bool
) -> None:
    settings = kafka_settings(kafka_partitions=1)
    log, topic = KafkaLog(settings), settings.topics.events
    await log.create_topics()
    large = random.Random(1).randbytes(settings.max_record_bytes)  # nothing to compress
    producer = log.producer()
    producer.send(topic, b"before", partition=0)
    producer.send(topic, large, partition=0)
    producer.send(topic, b"after", partition=0)
    producer.close(30.0)
    consumer = await subscribed(log, settings, transactional)
    assert [r.value for r in await read(consumer, 3)] == [b"before", large, b"after"]
    await consumer.close()


@pytest.mark.kafka
@both_clients
async def test_an_outage_of_the_broker_loses_and_repeats_nothing(
    kafka_settings: MakeSettings, kafka_broker: LocalKafka, transactional: bool
) -> None:
    settings = kafka_settings()
    log, topic = KafkaLog(settings), settings.topics.events
    await log.create_topics()
    consumer = await subscribed(log, settings, transactional)
    producer = log.producer()
    acks: list[Exception | None] = []
    stop = threading.Event()
    sent = 0

    def send_steadily() -> None:
        nonlocal sent
        while not stop.is_set():
            producer.send(topic, b"%d" % sent, partition=sent % 4, on_ack=lambda error, _: acks.append(error))
            sent += 1
            time.sleep(0.002)

    sender = threading.Thread(target=send_steadily)
    sender.start()
    try:
        found = await read(consumer, 100)
        await asyncio.to_thread(kafka_broker.kill)
        found += await read(consumer, 10_000, deadline_s=1.0)  # whatever was fetched before
        await asyncio.to_thread(kafka_broker.up)
        found += await read(consumer, 100)
    finally:
        stop.set()
        sender.join()
    producer.close(60.0)
    found += await read(consumer, sent - len(found))
    found += await read(consumer, 1, deadline_s=1.0)
    await consumer.close()
    assert acks == [None] * sent
    assert Counter(int(r.value) for r in found if isinstance(r.value, bytes)) == Counter(range(sent))


@pytest.mark.kafka
@both_clients
async def test_ends_count_what_an_open_transaction_has_written(
    kafka_settings: MakeSettings, transactional: bool
) -> None:
    settings = kafka_settings(kafka_partitions=1)
    log, topic = KafkaLog(settings), settings.topics.events
    await log.create_topics()
    (partition,) = events(settings)
    consumer = await subscribed(log, settings, transactional)
    producer = log.transactional_producer(f"{settings.topic_prefix}.writer")
    producer.init_transactions(30.0)
    producer.begin_transaction()
    for _ in range(3):
        producer.send(topic, b"open", partition=0)
    producer.flush(20.0)
    assert await consumer.end_offsets([partition]) == {partition: 3}
    assert await read(consumer, 1, deadline_s=0.5) == []

    late = log.consumer()  # a reader that starts at the end still sees later commits
    await late.assign([partition], "end")
    producer.commit_transaction(20.0)
    assert len(await read(consumer, 3)) == 3
    assert len(await read(late, 3)) == 3
    assert await consumer.end_offsets([partition]) == {partition: 4}  # the commit itself takes an offset
    await read(late, 1, deadline_s=0.5)
    assert late.position(partition) == 4
    for reader in (consumer, late):
        await reader.close()
    producer.close()


@pytest.mark.kafka
@both_clients
async def test_a_cancelled_poll_loses_nothing(kafka_settings: MakeSettings, transactional: bool) -> None:
    settings = kafka_settings(kafka_partitions=1)
    log, topic = KafkaLog(settings), settings.topics.events
    await log.create_topics()
    consumer = await subscribed(log, settings, transactional)
    producer = log.producer()
    producer.send(topic, b"0", partition=0)
    found = await read(consumer, 1)
    for n in range(1, 40):
        poll = asyncio.create_task(consumer.poll(1000, 5.0))
        producer.send(topic, b"%d" % n, partition=0)
        await asyncio.sleep(0.0005 * n)  # before, while and after the record comes
        poll.cancel()
        try:
            found += [r for r in await poll if isinstance(r, LogRecord)]
        except asyncio.CancelledError:
            continue
    producer.close(30.0)
    found += await read(consumer, 40 - len(found), deadline_s=10.0)
    await consumer.close()
    assert [r.offset for r in found] == list(range(40))


@pytest.mark.kafka
async def test_in_an_outage_every_call_ends_and_everything_can_be_closed(
    kafka_settings: MakeSettings, kafka_broker: LocalKafka
) -> None:
    settings = kafka_settings(kafka_partitions=1)
    log, topic = KafkaLog(settings), settings.topics.events
    await log.create_topics()
    (partition,) = events(settings)
    producer, consumers = log.producer(), [log.consumer("a"), log.transactional_consumer("b")]
    producer.send(topic, b"x", partition=0)
    producer.flush(20.0)
    for consumer in consumers:
        await consumer.subscribe([topic])
        assert len(await read(consumer, 1)) == 1
    await asyncio.to_thread(kafka_broker.kill)
    for consumer in consumers:
        assert [r for r in await consumer.poll(10, 0.2) if isinstance(r, LogRecord)] == []
    began = time.monotonic()
    with pytest.raises(LogUnavailable):
        await consumers[0].commit({partition: 1}, timeout_s=0.5)
    assert time.monotonic() - began < 3.0
    producer.send(topic, b"never", partition=0)
    with pytest.raises(LogUnavailable):
        producer.close(0.2)
    for consumer in consumers:
        began = time.monotonic()
        await consumer.close()
        assert time.monotonic() - began < 12.0
