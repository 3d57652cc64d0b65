"""Listing dead letters, and sending them again."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from io import BytesIO

import pytest
from factories import event, task
from fastavro import schemaless_writer

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.dead_letters import (
    dead_letter,
    find_dead_letters,
    letter_place,
    list_dead_letters,
    replay,
    send_dead_letter,
)
from millstream.consumers.log.memory_log import MemoryLog
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutTask
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", partitions=2, dead_partitions=2)
SETTINGS = load_settings(topic_prefix="t")


@pytest.fixture
def log():
    return MemoryLog(TOPICS, encode=True)


def letter(value=b"garbage", role="runner", reason="undecodable", topic="t.tasks.low"):
    return dead_letter(LogRecord(Partition(topic, 1), 5, 7, "k\udcff", value, {"h": b"\xfe"}), role, reason, "why")


def records(log, topic):
    return [record for part in log.partitions[topic] for record in part.records]


async def test_listing_by_reason_and_role(log):
    assert await list_dead_letters(log, TOPICS) == []
    producer = log.producer()
    for role, reason in (("runner", "undecodable"), ("adapter", "undecodable"), ("adapter", "attempts_exhausted")):
        send_dead_letter(producer.send, TOPICS, letter(role=role, reason=reason))
    producer.send(TOPICS.dead, b"no dead letter", partition=0)
    assert len(await list_dead_letters(log, TOPICS)) == 3
    assert len(await list_dead_letters(log, TOPICS, "undecodable", None)) == 2
    ((record, listed),) = await list_dead_letters(log, TOPICS, "undecodable", "runner")
    assert (listed.role, listed.reason, listed.error, listed.value) == ("runner", "undecodable", "why", b"garbage")
    place = letter_place(record)
    assert await find_dead_letters(log, TOPICS, [place]) == [listed]
    with pytest.raises(ConfigError, match="no dead letter at 0:99, x"):
        await find_dead_letters(log, TOPICS, [place, "0:99", "x"])


async def test_a_refused_record_is_sent_again_as_it_was(log):
    said = await replay(log.producer(), SETTINGS, letter())
    (record,) = records(log, TOPICS.tasks("low"))
    assert (record.key, record.value, record.headers) == ("k\udcff", b"garbage", {"h": b"\xfe"})
    assert said == "sent to t.tasks.low as it was, at offset 0 of its partition"


async def test_a_failed_rollouts_task_becomes_a_new_rollout_with_fresh_budgets(log):
    ended = task(attempt=4, lost_attempts=2, state=b"s", max_attempts=2, priority="high", metadata={"a": "b"}, seed=3)
    await replay(log.producer(), SETTINGS, letter(ended, "adapter", "attempts_exhausted", TOPICS.events))
    (record,) = records(log, TOPICS.tasks("high"))
    again = codec.decode_as(RolloutTask, record.value)
    assert again.rollout_id != ended.rollout_id
    assert (again.attempt, again.lost_attempts, again.state) == (1, 0, None)
    assert again.metadata == {"a": "b", "replay_of": ended.rollout_id}
    assert (
        replace(
            ended,
            **{
                n: getattr(again, n)
                for n in ("rollout_id", "attempt", "lost_attempts", "state", "metadata", "created_at")
            },
        )
        == again
    )


@asynccontextmanager
async def adapter_on(log):
    stop = asyncio.Event()
    running = asyncio.create_task(Adapter(log, TOPICS, transactional_id="a").run(stop))
    yield
    stop.set()
    await running


async def first(log, topic):
    """Waits for the first record of a topic."""
    consumer = log.consumer()
    await consumer.assign([Partition(topic, n) for n in range(2)])
    return (await consumer.poll(1, 10.0))[0]


@pytest.fixture
def newer(monkeypatch):
    """The schema of a future AttemptEvent, and a function that upgrades this process to the release that has it."""
    schema = codec.load_schema("AttemptEvent")
    schema["fields"].append({"name": "mood", "type": "string", "doc": "New.", "default": ""})

    class NewerCodec(codec.RecordCodec):
        def decode_dict(self, data):
            return {name: value for name, value in super().decode_dict(data).items() if name != "mood"}

    def upgrade():
        newer = NewerCodec(AttemptEvent, schema)
        monkeypatch.setitem(codec._BY_FINGERPRINT, newer.fingerprint, newer)

    return schema, upgrade


async def test_what_a_newer_version_wrote_is_replayed_after_an_upgrade(log, newer):
    of, producer, (schema, upgrade) = task(), log.producer(), newer
    body = BytesIO()
    schemaless_writer(body, schema, asdict(event(of, "a", "succeeded")) | {"mood": "fine"})
    value = codec.MAGIC + codec.fingerprint_of(schema) + body.getvalue()
    async with adapter_on(log):
        await send_acknowledged(producer, TOPICS.events, event(of, "a", "preparing"), key=of.rollout_id)
        await send_acknowledged(producer, TOPICS.events, value, key=of.rollout_id, headers={"kind": b"succeeded"})
        await first(log, TOPICS.dead)
    ((record, listed),) = await list_dead_letters(log, TOPICS)
    assert listed.reason == "undecodable"
    assert codec.fingerprint_of(schema).hex() in listed.error

    upgrade()
    said = await replay(producer, SETTINGS, (await find_dead_letters(log, TOPICS, [letter_place(record)]))[0])
    assert said.startswith(f"sent to {TOPICS.events} as it was")
    refused, again = [r for r in records(log, TOPICS.events) if r.value == value]
    assert (refused.partition, refused.key, refused.headers) == (again.partition, again.key, again.headers)
    async with adapter_on(log):
        end = codec.decode((await first(log, TOPICS.triplets)).value)
    assert (end.rollout_id, end.status) == (of.rollout_id, "succeeded")
    assert len(await list_dead_letters(log, TOPICS)) == 1


async def test_what_an_adapter_gives_up_can_be_replayed(log):
    of = task()
    async with adapter_on(log):
        for what in ("preparing", "failed"):
            await send_acknowledged(log.producer(), TOPICS.events, event(of, "a", what), key=of.rollout_id)
        await first(log, TOPICS.dead)
    ((_, listed),) = await list_dead_letters(log, TOPICS)
    assert (listed.role, listed.reason, listed.error) == ("adapter", "attempts_exhausted", "failed: ValueError: no")
    assert listed.key == of.rollout_id.encode()
    said = await replay(log.producer(), SETTINGS, listed)
    (record,) = records(log, TOPICS.tasks("normal"))
    assert said == f"rollout {of.rollout_id} is run again as {codec.decode_as(RolloutTask, record.value).rollout_id}"


@pytest.mark.parametrize(
    ("refused", "why"),
    [(replace(letter(), value=None), "without its body"), (letter(role="sink", reason="unstorable"), "the sink alone")],
)
async def test_what_must_not_be_sent_again_is_refused(log, refused, why):
    with pytest.raises(ConfigError, match=why):
        await replay(log.producer(), SETTINGS, refused)
    assert records(log, TOPICS.tasks("low")) == []


@pytest.mark.parametrize("reason", ["undecodable", "too_large"])
async def test_a_task_that_a_runner_refused_and_ended_becomes_a_new_rollout(log, reason):
    """Entry C1: under its old id it would be late, and never run."""
    of = task(attempt=2, state=b"s")
    refused = replace(letter(codec.encode(of), reason=reason), headers={"rollout": of.rollout_id.encode()})
    for _ in range(2):
        await replay(log.producer(), SETTINGS, refused)
    again = [codec.decode_as(RolloutTask, record.value) for record in records(log, TOPICS.tasks("normal"))]
    assert {(x.attempt, x.state, x.metadata["replay_of"]) for x in again} == {(1, None, of.rollout_id)}
    assert len({of.rollout_id, *(x.rollout_id for x in again)}) == 3
    with pytest.raises(ConfigError, match="the task still can't be read"):
        await replay(log.producer(), SETTINGS, replace(refused, value=b"garbage"))
