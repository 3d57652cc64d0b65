"""The adapter on a real Kafka: retries, then the end; dead letters can be found and replayed."""

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from factories import event, task
from prometheus_client import CollectorRegistry

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.dead_letters import list_dead_letters, send_dead_letter
from millstream.consumers.dead_letters import replay as replay_letter
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.config.settings import Settings
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import KIND_HEADER, LogRecord, Partition
from millstream.schemas.wire.records import RolloutEnd, RolloutTask, Settled
from millstream.schemas.wire.settled import end_mark, packed, win_mark
from millstream.schemas.wire.topics import partition_of

pytestmark = pytest.mark.kafka


@asynccontextmanager
async def adapter_on(log, topics, registry=None):
    stop = asyncio.Event()
    adapter = Adapter(log, topics, transactional_id=f"{topics.prefix}.adapter.0", registry=registry)
    running = asyncio.create_task(adapter.run(stop))
    try:
        yield
    finally:
        stop.set()
        await running


async def read(log, partitions, count):
    consumer = log.consumer()
    found = []
    try:
        await consumer.assign(partitions)
        async with asyncio.timeout(30):
            while len(found) < count:
                found += [r for r in await consumer.poll(100, 1.0) if isinstance(r, LogRecord)]
    finally:
        await consumer.close()
    return [codec.decode(record.value) for record in found]


async def test_attempts_are_retried_across_a_restart_and_dead_letters_are_replayed(
    kafka_settings: Callable[..., Settings],
) -> None:
    settings = kafka_settings()
    topics, log = settings.topics, KafkaLog(settings)
    await log.create_topics()
    producer = log.producer()
    waiting = [Partition(topics.tasks("normal"), n) for n in range(4)]
    triplets = [Partition(topics.triplets, n) for n in range(4)]

    async def write(*events):
        for one in events:
            await send_acknowledged(producer, topics.events, one, key=one.rollout_id)

    first = [task(max_attempts=2) for _ in range(6)]
    async with adapter_on(log, topics):
        for of in first:
            await write(event(of, "a", "preparing"), event(of, "a", "failed"))
        second = await read(log, waiting, 6)
    assert sorted((of.rollout_id, of.attempt) for of in second) == sorted((of.rollout_id, 2) for of in first)
    registry = CollectorRegistry()
    async with adapter_on(log, topics, registry):
        for of in second:
            await write(event(of, "b", "preparing"), event(of, "b", "failed" if of is second[0] else "succeeded"))
        ends = await read(log, triplets, 6)
        await write(*(event(of, "a", "succeeded") for of in first))
        async with asyncio.timeout(30):
            await write(event(last := task(), "z", "preparing"), event(last, "z", "cancelled"))
            ends = await read(log, triplets, 7)
    assert all(isinstance(end, RolloutEnd) for end in ends)
    assert sorted(end.status for end in ends) == ["cancelled", "failed", *["succeeded"] * 5]
    assert len(await read(log, waiting, 6)) == 6  # the restarted adapter published none again
    assert registry.get_sample_value("millstream_retries_total", {"status": "failed"}) is None

    ((_, letter),) = await list_dead_letters(log, topics)
    assert (letter.role, letter.reason) == ("adapter", "attempts_exhausted")
    assert letter.key == second[0].rollout_id.encode()
    await replay_letter(producer, settings, letter)
    again = [of for of in await read(log, waiting, 7) if of.attempt == 1]
    assert [of.metadata for of in again if isinstance(of, RolloutTask)] == [{"replay_of": second[0].rollout_id}]

    send_dead_letter(producer.send, topics, replace(letter, value=None))  # it can't be replayed
    await asyncio.to_thread(producer.close)
    code, said = await dead_replay(settings, "--all", "--reason", "attempts_exhausted")
    assert (code, said.splitlines()[-1]) == (1, "1 of 2 replayed")
    assert ": not replayed: the record was kept without its body" in said
    assert len(await read(log, waiting, 8)) == 8
    assert await dead_replay(settings, "--all", "--reason", "undecodable") == (0, "0 of 0 replayed\n")
    for wrong in ((), ("--all", "0:0"), ("--reason", "undecodable"), ("0:0", "--role", "sink")):
        code, said = await dead_replay(settings, *wrong)
        assert code == 2
        assert "name places" in said


async def dead_replay(settings: Settings, *arguments: str) -> tuple[int, str]:
    """The command's exit code and all it says."""
    environment = os.environ | {
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
        "COLUMNS": "200",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "millstream.pipeline", "dead", "replay", *arguments),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


async def test_a_successor_waits_for_what_its_frozen_predecessor_may_still_commit(
    kafka_settings: Callable[..., Settings],
) -> None:
    settings = kafka_settings()
    topics, log = settings.topics, KafkaLog(settings)
    await log.create_topics()
    producer, frozen = log.producer(), log.transactional_producer(f"{topics.prefix}.adapter.1")
    number = {of: partition_of(of, topics.partitions) for of in (f"rollout-{n}" for n in range(20))}
    ours, elsewhere = (task(rollout_id=next(of for of in number if number[of] == at)) for at in (0, 1))
    for of in (ours, elsewhere):
        for one in (event(of, "a", "preparing"), event(of, "a", "succeeded")):
            await send_acknowledged(producer, topics.events, one, key=of.rollout_id)
    await asyncio.to_thread(frozen.init_transactions, 10)
    frozen.begin_transaction()
    end = RolloutEnd(
        rollout_id=ours.rollout_id,
        group_id=ours.group_id,
        group_size=1,
        status="succeeded",
        attempt_id="a",
        attempts=1,
        created_at=1,
        ended_at=2,
    )
    for topic in (topics.triplets, topics.events):
        frozen.send(topic, end, key=ours.rollout_id, partition=0, headers={KIND_HEADER: b"end"})
    settled = Settled(marks=packed([end_mark(ours.rollout_id), win_mark("a")]))
    frozen.send(topics.settled, settled, partition=0)
    await asyncio.to_thread(frozen.flush, 10)

    async def ended_on(partition):
        of = task()
        for one in (event(of, "a", "preparing"), event(of, "a", "cancelled")):
            await send_acknowledged(producer, topics.events, one, key=of.rollout_id, partition=partition)
        return of

    registry = CollectorRegistry()
    async with adapter_on(log, topics, registry):
        for count in (1, 2, 3):  # by the third transaction it would have settled ours, too
            await read(log, [Partition(topics.triplets, 1)], count)
            await ended_on(1)
        await asyncio.to_thread(frozen.commit_transaction, 10)
        last = await ended_on(0)
        ends = await read(log, [Partition(topics.triplets, 0)], 2)
    assert [end.rollout_id for end in ends] == [ours.rollout_id, last.rollout_id]
    assert registry.get_sample_value("millstream_late_records_total", {"kind": "zombie_result"}) is None
