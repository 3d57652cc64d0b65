"""A replay over what a real adapter has written: the same code gives the same bytes, other code other triplets."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from factories import call, event, reward, span, task
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.adapter.replay import Replay
from millstream.consumers.adapter.triplets import to_triplets
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.read_to_end import read_to_end
from millstream.pipeline.cli.main import app
from millstream.pipeline.store.replay import Start, open_output, run_replay
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutEnd, Triplet

E = "mine"


@pytest.fixture
def settings(request):
    make = request.getfixturevalue("kafka_settings") if request.node.get_closest_marker("kafka") else load_settings
    return make(kafka_partitions=4)


@pytest.fixture(params=["encoded", "live"])
async def log(request, settings):
    if request.param == "kafka":
        made = KafkaLog(settings)
        await made.create_topics()
        return made
    return MemoryLog(settings.topics, encode=request.param == "encoded")


on_memory = pytest.mark.parametrize("log", ["encoded"], indirect=True)


@asynccontextmanager
async def adapter_on(log, settings, registry=None):
    adapter = Adapter(log, settings.topics, transactional_id="a", registry=registry)
    stop = asyncio.Event()
    running = asyncio.create_task(adapter.run(stop))
    await adapter.wait_ready()
    try:
        yield adapter
    finally:
        stop.set()
        await running


async def write(log, settings, *values):
    producer = log.producer()
    for value in values:
        key = "garbage" if isinstance(value, bytes) else value.rollout_id
        await send_acknowledged(producer, settings.topics.events, value, key=key)
    producer.close()


def turns(of, attempt, n=2, claim=True):
    """Calls that earn 1, 2, … and a span between them."""
    return (
        *([event(of, attempt, "preparing")] if claim else []),
        *(record for i in range(n) for record in (call(of, attempt, str(i)), reward(of, attempt, i + 1.0))),
        span(of, attempt),
        event(of, attempt, "succeeded", span_counts={"agent": n + 1, "proxy": n}),
    )


async def all_of(log, settings, topic):
    partitions = [Partition(topic, n) for n in range(settings.topics.partitions)]
    return [record async for record in read_to_end(log, partitions)]


async def ended(log, settings, count):
    """Until so many rollouts have ended."""
    consumer = log.consumer()
    await consumer.assign([Partition(settings.topics.triplets, n) for n in range(settings.topics.partitions)])
    ends = 0
    async with asyncio.timeout(30):
        while ends < count:
            ends += sum(codec.type_of(r.value) is RolloutEnd for r in await consumer.poll(100, 1.0))
    await consumer.close()


async def record_a_run(log, settings):
    """Whatever an experiment may hold. Returns the number of its rollouts."""
    plain = [task(experiment_id=E) for _ in range(12)]
    other, failed, cancelled = task(experiment_id="other"), task(experiment_id=E), task(experiment_id=E)
    again, silent = task(experiment_id=E, max_attempts=2), task(experiment_id=E, lease_s=0.05, max_lost_attempts=1)
    lacking, unread, unfinished = (task(experiment_id=E) for _ in range(3))
    registry = CollectorRegistry()
    retries = partial(registry.get_sample_value, "millstream_retries_total")
    async with adapter_on(log, settings, registry):
        await write(log, settings, *turns(plain[0], "a"), *turns(other, "a"), b"garbage")
        await write(log, settings, *(record for of in plain[1:] for record in turns(of, "a", n=3)))
        await write(log, settings, event(failed, "a", "preparing"), event(failed, "a", "failed"))
        await write(log, settings, event(cancelled, "a", "preparing"), event(cancelled, "a", "cancelled"))
        await write(log, settings, event(again, "a", "preparing"), *turns(again, "a", claim=False)[:-1])
        await write(log, settings, event(again, "a", "failed"), event(silent, "s", "preparing"))
        await write(log, settings, *turns(lacking, "a")[:1], *turns(lacking, "a")[2:], *turns(unfinished, "a")[:-1])
        await write(log, settings, event(unread, "a", "preparing"))
        await send_acknowledged(
            log.producer(), settings.topics.events, codec.encode(span(unread, "a"))[:60], key=unread.rollout_id
        )
        await write(log, settings, event(unread, "a", "succeeded", span_counts={"agent": 1}))
        async with asyncio.timeout(20):
            while None in (retries({"status": "failed"}), retries({"status": "lost"})):  # noqa: ASYNC110 - a metric
                await asyncio.sleep(0.02)
        late = turns(silent, "s", claim=False)  # of the attempt that was given up: the next one counts
        await write(log, settings, *late, *turns(replace(silent, attempt=2, lost_attempts=1), "t"))
        await write(log, settings, *turns(replace(again, attempt=2), "b"), *late)
        await ended(log, settings, 19)
    return 18


async def replayed(log, settings, to, start=None, progress=None, **functions):
    output = await open_output(to, log, settings)
    return await run_replay(log, settings.topics, Replay(E, **functions), output, start, progress)


def by_partition(records):
    found = {}
    for record in records:
        value = record.value if isinstance(record.value, bytes) else codec.encode(record.value)
        if codec.decode(value).experiment_id == E:
            found.setdefault(record.partition.number, []).append((record.key, value, dict(record.headers)))
    return found


async def test_the_same_code_gives_the_same_bytes_in_the_same_order(log, settings):
    rollouts = await record_a_run(log, settings)
    shown = []
    again = f"{settings.topics.prefix}.again"
    summary = await replayed(log, settings, again, progress=lambda *done: shown.append(done))
    assert shown == sorted(shown)
    assert shown[-1][0] == shown[-1][1] > 3 * rollouts  # records
    original = by_partition(await all_of(log, settings, settings.topics.triplets))
    assert by_partition(await all_of(log, settings, f"{settings.topics.prefix}.again")) == original
    assert (summary.rollouts, summary.incomplete, summary.open) == (rollouts, 0, 1)
    kinds = [type(codec.decode(value)) for part in original.values() for _, value, _ in part]
    assert (kinds.count(RolloutEnd), kinds.count(Triplet)) == (rollouts, summary.triplets)
    assert summary.trainable == summary.triplets - 1  # of the rollout that lacks a span


@on_memory
async def test_other_functions_give_other_triplets(log, settings):
    of = task(experiment_id=E)
    async with adapter_on(log, settings):
        await write(log, settings, *turns(of, "a"))
        await ended(log, settings, 1)
    await replayed(log, settings, "doubled", function=lambda trace: [t for t in to_triplets(trace) for _ in "12"])
    *four, end = [codec.decode(r.value) for r in await all_of(log, settings, "doubled")]
    assert ([t.reward for t in four], end.turns, end.reward) == ([1.0, 1.0, 2.0, 2.0], 4, 3.0)

    summary = await replayed(log, settings, "rewarded", reward=lambda trace: -float(len(trace.spans)))
    *two, end = [codec.decode(r.value) for r in await all_of(log, settings, "rewarded")]
    assert ([t.reward for t in two], end.reward, summary.rewards) == ([None, -5.0], -5.0, [-5.0])

    await replayed(log, settings, "none", reward=lambda trace: None)
    *two, end = [codec.decode(r.value) for r in await all_of(log, settings, "none")]
    assert ([t.reward for t in two], end.reward, end.trainable) == ([None, None], None, True)

    await replayed(log, settings, "failing", reward=lambda trace: 1 / 0)
    (end,) = [codec.decode(r.value) for r in await all_of(log, settings, "failing")]
    assert (end.trainable, end.status) == (False, "succeeded")
    assert "ZeroDivisionError" in end.reason


@pytest.mark.kafka
@pytest.mark.parametrize("log", ["kafka"], indirect=True)
async def test_on_kafka_and_where_retention_has_taken_the_beginning(log, settings):
    rollouts = await record_a_run(log, settings)
    original = by_partition(await all_of(log, settings, settings.topics.triplets))
    whole, cut = (f"{settings.topics.prefix}.{name}" for name in ("whole", "cut"))
    summary = await replayed(log, settings, whole)
    assert by_partition(await all_of(log, settings, whole)) == original
    assert (summary.rollouts, summary.open) == (rollouts, 1)

    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    events = [Partition(settings.topics.events, n) for n in range(2)]
    consumer = log.consumer()
    ends = await consumer.end_offsets(events)
    await consumer.close()
    taken = [TopicPartition(p.topic, p.number, min(20, ends[p] // 2)) for p in events]
    for deleted in admin.delete_records(taken).values():
        deleted.result(10)
    variables = ("kafka_bootstrap_servers", "kafka_partitions", "topic_prefix")
    env = {f"MILLSTREAM_{name.upper()}": str(getattr(settings, name)) for name in variables}
    command = ["replay", "--experiment", E, "--to", cut, "--json"]
    result = await asyncio.to_thread(CliRunner().invoke, app, command, env=env, catch_exceptions=False)
    (row,) = json.loads(result.output)
    again = by_partition(await all_of(log, settings, cut))
    assert {n for n in original if again.get(n) != original[n]} <= {0, 1}  # the other partitions are complete
    assert all(set(map(str, again.get(n, ()))) <= set(map(str, part)) for n, part in original.items())
    assert 0 < row["rollouts"] < rollouts
    assert row["rollouts"] + row["incomplete"] <= rollouts


@on_memory
async def test_a_place_that_holds_something_is_refused(log, settings):
    for name in (settings.topics.triplets, settings.topics.events):
        with pytest.raises(ConfigError, match="own topics"):
            await open_output(name, log, settings)
    await log.create_topics([replace(settings.topics.all[-1], name="three", partitions=3)])
    with pytest.raises(ConfigError, match="3 partitions"):
        await open_output("three", log, settings)
    output = await open_output("new", log, settings)
    await output.close()
    log.producer().send("new", b"x", partition=1)
    with pytest.raises(ConfigError, match="holds records already"):
        await open_output("new", log, settings)


@on_memory
async def test_from_an_offset_or_a_time(log, settings):
    early, middle, late = (task(experiment_id=E) for _ in range(3))
    async with adapter_on(log, settings):
        await write(log, settings, *turns(early, "a"), *turns(middle, "a")[:2])
        await ended(log, settings, 1)
        offsets = {n: len(part.records) for n, part in enumerate(log.partitions[settings.topics.events])}
        await asyncio.sleep(0.002)  # timestamps are milliseconds
        await write(log, settings, *turns(middle, "a")[2:], *turns(late, "a"))
        await ended(log, settings, 3)
    (claim,) = [
        r
        for r in await all_of(log, settings, settings.topics.events)
        if r.key == late.rollout_id and r.headers == {} and getattr(codec.decode(r.value), "status", "") == "preparing"
    ]
    for name, start in (("offset", Start(offsets=offsets)), ("time", Start(time_ms=claim.timestamp))):
        summary = await replayed(log, settings, name, start)
        assert {r.key for r in await all_of(log, settings, name)} == {late.rollout_id}, name
        assert (summary.rollouts, summary.incomplete) == (1, 1)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("0:120,11:340", Start(offsets={0: 120, 11: 340})),
        ("2027-01-15T08:00", Start(time_ms=1_800_000_000_000)),
        ("2027-01-15T09:00:00+01:00", Start(time_ms=1_800_000_000_000)),
    ],
)
def test_what_a_start_may_be(text, start):
    assert Start.parse(text) == start


@pytest.mark.parametrize("text", ["0:", "yesterday", "1", "0:1;1:2"])
def test_another_start_is_refused(text):
    with pytest.raises(ConfigError, match="--from"):
        Start.parse(text)
