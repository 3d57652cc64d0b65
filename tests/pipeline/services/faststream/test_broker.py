"""Processors on `ms.broker`, with a real Kafka: no record is skipped if a handler raises."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import event, task
from faststream.kafka import KafkaMessage

import millstream as ms
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import WrongType
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, DeadLetter

pytestmark = pytest.mark.kafka
MakeSettings = Callable[..., Settings]
GROUP = "processor"


async def begin(make: MakeSettings, values: list[Any], **headers: bytes) -> tuple[Settings, KafkaLog]:
    """A log whose events topic holds these, spread over its partitions; a number is an AttemptEvent of that attempt."""
    settings = make(max_record_bytes=1 << 20)
    log = KafkaLog(settings)
    await log.create_topics()
    await send(log, settings, values, **headers)
    return settings, log


async def send(log: KafkaLog, settings: Settings, values: list[Any], **headers: bytes) -> None:
    producer = log.producer()
    for index, value in enumerate(values):
        body = event(task(), "a", "running", attempt=value) if isinstance(value, int) else value
        await send_acknowledged(
            producer, settings.topics.events, body, key=str(value)[:9], partition=index % 2, headers=headers
        )
    await asyncio.to_thread(producer.close)


async def read(log: KafkaLog, topic: str, partitions: int = 1) -> list[Any]:
    """All records of a topic."""
    consumer = log.consumer()
    try:
        mine = [Partition(topic, n) for n in range(partitions)]
        await consumer.assign(mine)
        found: list[Any] = []
        ends = await consumer.end_offsets(mine)
        while any((consumer.position(p) or 0) < ends[p] for p in mine):
            found += [codec.decode(r.value) for r in await consumer.poll(100, 0.2) if isinstance(r, LogRecord)]
        return found
    finally:
        await consumer.close()


class Seen:
    """The values that a handler got; ``done`` is set once they are enough."""

    def __init__(self, enough: Callable[["Seen"], bool]) -> None:
        self.values: list[Any] = []
        self.done = asyncio.Event()
        self._enough = enough

    def add(self, *values: Any) -> None:
        self.values += values
        if self._enough(self):
            self.done.set()

    async def wait(self) -> None:
        await asyncio.wait_for(self.done.wait(), 40)


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batches"])
async def test_a_handler_that_raises_skips_nothing(kafka_settings: MakeSettings, batch: bool) -> None:
    settings, log = await begin(kafka_settings, list(range(20)))
    broker = ms.broker(settings)
    seen, failures = Seen(lambda s: set(s.values) == set(range(20))), iter([True, True, False, True])

    @broker.subscriber(settings.topics.events, group_id=GROUP, batch=batch, max_records=7)
    async def fragile(record: Any) -> None:
        records = record if batch else [record]
        if 11 in [r.attempt for r in records] and next(failures, False):
            raise OSError("not now")
        seen.add(*(r.attempt for r in records))

    async with broker:
        await broker.start()
        await seen.wait()
    assert await read(log, settings.topics.dead) == []
    if not batch:
        assert sorted(seen.values) == list(range(20))  # each once
        even = [n for n in seen.values if n % 2 == 0]
        assert even == sorted(even)  # partitions keep their order


async def test_a_record_that_always_fails_becomes_a_dead_letter_and_the_rest_goes_on(
    kafka_settings: MakeSettings,
) -> None:
    settings, log = await begin(kafka_settings, list(range(10)))
    broker = ms.broker(settings, tries=3)
    tries, seen = [], Seen(lambda s: len(s.values) == 9)

    @broker.subscriber(settings.topics.events, group_id=GROUP)
    async def picky(record: AttemptEvent) -> None:
        if record.attempt == 4:
            tries.append(record)
            raise ValueError("four is too much")
        seen.add(record.attempt)

    async with broker:
        await broker.start()
        await seen.wait()
    assert len(tries) == 3
    assert sorted(seen.values) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    (letter,) = await read(log, settings.topics.dead)
    assert isinstance(letter, DeadLetter)
    assert (letter.role, letter.reason, letter.error) == ("picky", "handler", "ValueError: four is too much")
    assert (letter.topic, letter.partition, letter.offset, letter.key) == (settings.topics.events, 0, 2, b"4")
    assert letter.value is not None
    assert codec.decode_as(AttemptEvent, letter.value).attempt == 4


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batches"])
async def test_what_can_not_be_decoded_becomes_a_dead_letter_at_once(kafka_settings: MakeSettings, batch: bool) -> None:
    settings, log = await begin(kafka_settings, [0, b'{"json": 1}', 2, codec.encode(task())[:-3], 4])
    broker = ms.broker(settings)
    seen = Seen(lambda s: set(s.values) == {0, 2, 4})

    @broker.subscriber(settings.topics.events, group_id=GROUP, batch=batch)
    async def reader(record: Any) -> None:
        seen.add(*(r.attempt for r in (record if batch else [record])))

    async with broker:
        await broker.start()
        await seen.wait()
        letters: list[Any] = []
        while len(letters) < 2:
            letters = await read(log, settings.topics.dead)
    assert {(one.role, one.reason, one.offset) for one in letters} == {
        ("reader", "undecodable", 0),
        ("reader", "undecodable", 1),
    }


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batches"])
async def test_headers_may_hold_anything(kafka_settings: MakeSettings, batch: bool) -> None:
    settings, log = await begin(kafka_settings, [7, b"garbage"], trace=b"\xff\xfe")
    await send(log, settings, [8])
    broker, seen = ms.broker(settings), Seen(lambda s: set(s.values) == {7, 8})

    @broker.subscriber(settings.topics.events, group_id=GROUP, batch=batch)
    async def reader(record: Any) -> None:
        seen.add(*(r.attempt for r in (record if batch else [record])))

    async with broker:
        await broker.start()
        await seen.wait()
        letters: list[Any] = []
        while not letters:
            letters = await read(log, settings.topics.dead)
    assert letters[0].headers["trace"] == b"\xff\xfe"  # as it was


async def test_a_processor_that_ends_while_a_record_fails_gets_it_again(kafka_settings: MakeSettings) -> None:
    settings, log = await begin(kafka_settings, [0, 1, 2])
    failing = asyncio.Event()
    first, second = ms.broker(settings), ms.broker(settings)

    @first.subscriber(settings.topics.events, group_id=GROUP)
    async def broken(record: Any) -> None:
        failing.set()
        raise OSError("not now")

    async with first:
        await first.start()
        await asyncio.wait_for(failing.wait(), 30)
    seen = Seen(lambda s: set(s.values) == {0, 1, 2})

    @second.subscriber(settings.topics.events, group_id=GROUP)
    async def mended(record: AttemptEvent) -> None:
        seen.add(record.attempt)

    async with second:
        await second.start()
        await seen.wait()
    assert await read(log, settings.topics.dead) == []


async def test_processors_share_the_work_and_a_rebalance_skips_nothing(kafka_settings: MakeSettings) -> None:
    settings, log = await begin(kafka_settings, list(range(30)))
    half, seen = asyncio.Event(), Seen(lambda s: set(s.values) == set(range(60)))
    first, second = ms.broker(settings), ms.broker(settings)

    def subscribe(broker: Any) -> None:
        flaky = iter(range(10_000))

        @broker.subscriber(settings.topics.events, group_id=GROUP, session_timeout_ms=6000, heartbeat_interval_ms=200)
        async def count(record: AttemptEvent) -> None:
            if next(flaky) % 4 == 0:
                raise OSError("not now")
            seen.add(record.attempt)
            if len(seen.values) == 15:
                half.set()

    subscribe(first)
    subscribe(second)
    async with first:
        await first.start()
        await asyncio.wait_for(half.wait(), 30)
        async with second:  # joins while records fail, and leaves while they fail
            await second.start()
            await send(log, settings, list(range(30, 60)))
        await seen.wait()
    assert await read(log, settings.topics.dead) == []


async def test_handlers_publish_records(kafka_settings: MakeSettings) -> None:
    settings, log = await begin(kafka_settings, [1, 2, 3])
    broker, seen = ms.broker(settings), Seen(lambda s: len(s.values) == 2)

    @broker.subscriber(settings.topics.events, group_id=GROUP)
    async def forward(record: AttemptEvent, message: KafkaMessage) -> None:
        if record.attempt > 1:
            await broker.publish(record, settings.topics.triplets, key=message.raw_message.key)  # type: ignore[union-attr]

    @broker.subscriber(settings.topics.triplets, group_id="other")
    async def read_on(record: AttemptEvent) -> None:
        seen.add(record.attempt)

    async with broker:
        await broker.start()
        await seen.wait()
        with pytest.raises(WrongType, match="dict can't be published"):
            await broker.publish({"a": 1}, settings.topics.triplets)
    assert sorted(seen.values) == [2, 3]
    found = await read(log, settings.topics.triplets, 4)
    assert sorted(one.attempt for one in found) == [2, 3]


async def test_the_example_counts_failures(kafka_settings: MakeSettings) -> None:
    bad = task()
    settings, _ = await begin(kafka_settings, [event(bad, "a", "failed"), 1, event(bad, "b", "failed")])
    example = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "examples.processor.failures",
        cwd=Path(__file__).parents[3],
        env=os.environ
        | {
            "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
            "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        },
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert example.stdout is not None
        lines = [await asyncio.wait_for(example.stdout.readline(), 40) for _ in range(2)]
    finally:
        example.terminate()
        await example.wait()
    assert lines == [b"{'ValueError': 1}\n", b"{'ValueError': 2}\n"]
