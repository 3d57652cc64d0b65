import asyncio
import logging
from uuid import uuid4

import factories
import pytest

from millstream.consumers import sink as sink_module
from millstream.consumers.sink import Sink
from millstream.pipeline.kafka_log import KafkaLog
from millstream.pipeline.memory_log import MemoryLog
from millstream.pipeline.store import ClickHouseStore
from millstream.schemas import status
from millstream.schemas.errors import StoreError
from millstream.schemas.ids import new_id
from millstream.schemas.log import Partition
from millstream.schemas.records import RolloutEnd, Triplet
from millstream.schemas.resources import LLM, Resources
from millstream.schemas.settings import load_settings

VIEWS = ("tasks", "attempts", "rollouts", "spans", "rewards", "triplets", "resources", "dead_letters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the one embedded engine that a process can have."""
    folder = tmp_path_factory.mktemp("store")
    held = ClickHouseStore(load_settings(clickhouse_dsn=f"chdb://{folder}"))
    yield folder
    held.close()


@pytest.fixture
def kind(request):
    return getattr(request, "param", "live")


on_each_log = pytest.mark.parametrize(
    "kind", ["live", "encoded", pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True
)


@pytest.fixture
def settings(request, folder, kind):
    make = request.getfixturevalue("kafka_settings") if kind == "kafka" else load_settings
    return make(
        clickhouse_dsn=f"chdb://{folder}",
        clickhouse_database=f"d{uuid4().hex}",
        kafka_partitions=3,
        span_batch_size=100,
    )


@pytest.fixture
def store(settings):
    opened = ClickHouseStore(settings)
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
async def log(settings, kind):
    made = KafkaLog(settings) if kind == "kafka" else MemoryLog(settings.topics, encode=kind == "encoded")
    await made.create_topics()
    return made


def counts(store):
    return {view: store.sql(f"SELECT count() FROM {view}").rows[0][0] for view in VIEWS}


def publish(log, settings, rollouts, spans=4):
    """Whole rollouts as the roles write them; returns what the store has to hold then."""
    topics, producer = settings.topics, log.producer()
    settled = []
    for n in range(rollouts):
        task, attempt = factories.task(), new_id()
        end = RolloutEnd(
            rollout_id=task.rollout_id,
            group_id=task.group_id,
            group_size=1,
            status="succeeded",
            attempt_id=attempt,
            attempts=1,
            turns=1,
            reward=0.5,
            created_at=task.created_at,
            ended_at=task.created_at + 9,
        )
        triplet = Triplet(
            rollout_id=task.rollout_id,
            attempt_id=attempt,
            group_id=task.group_id,
            turn=0,
            span_id="s",
            prompt="[]",
            response="{}",
        )
        producer.send(topics.tasks("normal"), task, partition=n % settings.kafka_partitions)
        events = [
            factories.event(task, attempt, status.PREPARING),
            *[factories.event(task, attempt, status.RUNNING) for _ in range(3)],
            *[factories.span(task, attempt, sequence=s) for s in range(1, spans)],
            factories.reward(task, attempt, 0.5),
            factories.event(task, attempt, status.SUCCEEDED),
        ]
        for record in events:
            producer.send(topics.events, record, key=task.rollout_id)
        settled += [(topics.triplets, triplet), (topics.triplets, end), (topics.events, end)]
    version = Resources(resources_id=new_id(), experiment_id="e", items={"m": LLM(model="m", model_version="r.0.1")})
    producer.send(topics.control, version.to_control(created_at=1), key=f"resources/{version.resources_id}")
    producer.close(20.0)
    adapter = log.transactional_producer(f"{topics.prefix}.adapter.1")
    adapter.init_transactions(20.0)
    adapter.begin_transaction()
    for topic, record in settled:
        adapter.send(topic, record, key=record.rollout_id)
    adapter.flush(20.0)
    adapter.commit_transaction(20.0)
    adapter.close(20.0)
    return {
        "tasks": rollouts,
        "attempts": rollouts,
        "rollouts": rollouts,
        "spans": rollouts * spans,
        "rewards": rollouts,
        "triplets": rollouts,
        "resources": 1,
        "dead_letters": 0,
    }


async def run_to_the_end(*sinks):
    """Each reads what the log holds now, and leaves."""
    stop = asyncio.Event()
    stop.set()
    await asyncio.gather(*(sink.run(stop) for sink in sinks))


async def eventually(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the store tells nobody
            await asyncio.sleep(0.02)


class Unreliable:
    """A store that fails as it is told: before the rows are there, or after."""

    def __init__(self, store):
        self.store = store
        self.before = self.after = 0
        self.tokens = []

    def insert(self, *args):
        self._try(self.store.insert, args)

    def insert_avro(self, *args):
        self._try(self.store.insert_avro, args)

    def _try(self, insert, args):
        self.tokens.append(args[-1])
        if self.before:
            self.before -= 1
            raise StoreError("nobody answers")
        insert(*args)
        if self.after:
            self.after -= 1
            raise StoreError("the answer was lost")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(sink_module, "RETRY_S", 0.01)


@on_each_log
async def test_what_lies_on_the_topics_lies_in_the_store(log, settings, store, caplog):
    expected = publish(log, settings, 60)
    sink = Sink(log, store, settings)
    await run_to_the_end(sink)
    assert counts(store) == expected
    assert store.sql("SELECT status, count(), sum(reward) FROM rollouts GROUP BY status").rows == [
        ("succeeded", 60, 30.0)
    ]
    assert "stopped before the end" not in caplog.text
    assert sink.stats.flushes > 5  # of at most 100 records each
    assert sink.stats.records == 60 * (1 + 4 + 5 + 1 + 2) + 1


@on_each_log
async def test_rows_are_there_soon_without_being_asked_for(log, settings, store):
    stop = asyncio.Event()
    sink = Sink(log, store, settings, flush_s=0.05)
    running = asyncio.create_task(sink.run(stop))
    expected = publish(log, settings, 2)
    await eventually(lambda: counts(store) == expected)
    more = publish(log, settings, 1)
    stop.set()
    await running
    assert counts(store) == {view: n + (more[view] if view != "dead_letters" else 0) for view, n in expected.items()}


@on_each_log
async def test_a_restart_goes_on_where_the_last_one_ended(log, settings, store):
    first, second, third = (Sink(log, store, settings) for _ in range(3))
    publish(log, settings, 3)
    await run_to_the_end(first)
    expected = publish(log, settings, 2)
    await run_to_the_end(second)
    await run_to_the_end(third)
    assert (second.stats.records, third.stats.records) == (2 * 13 + 1, 0)
    assert counts(store)["rollouts"] == 5
    assert counts(store)["spans"] == 12 + expected["spans"]


@on_each_log
async def test_what_cannot_be_decoded_is_put_away_and_the_rest_goes_on(log, settings, store):
    topics = settings.topics
    expected = publish(log, settings, 2)
    producer = log.producer()
    producer.send(topics.tasks("high"), b"garbage", key="k", partition=0, headers={"h": b"\xfe"})
    producer.send(topics.events, b"more garbage", key="k")  # the adapter's to put away
    producer.send(topics.dead, b"\xc3\x01nothing known", key=None)
    producer.close(20.0)
    sink = Sink(log, store, settings)
    await run_to_the_end(sink)
    assert counts(store) == expected | {"dead_letters": 2}
    letters = store.sql(
        "SELECT source_topic, source_partition, source_offset, role, reason, hex(value), hex(key) FROM dead_letters "
        "ORDER BY source_topic"
    ).rows
    assert letters[1] == (
        topics.tasks("high"),
        0,
        0,
        "sink",
        "undecodable",
        b"garbage".hex().upper(),
        b"k".hex().upper(),
    )
    assert letters[0][:2] == (topics.dead, 0)
    assert (sink.stats.unusable, sink.stats.dead_letters) == (3, 2)
    again = Sink(log, store, settings)
    await run_to_the_end(again)
    assert again.stats.records == 0


async def test_a_key_that_is_no_text_is_put_away_as_it_was(log, settings, store):
    key = b"\xff\x00k"
    log.producer().send(
        settings.topics.tasks("low"), b"garbage", key=key.decode("utf-8", "surrogateescape"), partition=2
    )
    await run_to_the_end(Sink(log, store, settings))
    assert store.sql("SELECT hex(key) FROM dead_letters").rows == [(key.hex().upper(),)]


async def test_a_live_record_that_no_column_holds_is_put_away(settings, store):
    log = MemoryLog(settings.topics)
    task = factories.task()
    spans = [factories.span(task, "a", sequence=n, name="\ud800" if n == 37 else "work") for n in range(80)]
    for span in spans:
        log.producer().send(settings.topics.events, span, partition=1)
    await run_to_the_end(Sink(log, store, settings))
    assert counts(store)["spans"] == 79
    assert store.sql("SELECT source_offset, reason FROM dead_letters").rows == [(37, "unstorable")]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("failing", ["before", "after"])
@on_each_log
async def test_a_store_that_fails_for_a_while_loses_and_doubles_nothing(log, settings, store, failing, caplog):
    unreliable = Unreliable(store)
    setattr(unreliable, failing, 7)
    expected = publish(log, settings, 5)
    sink = Sink(log, unreliable, settings)
    with caplog.at_level(logging.WARNING, logger="millstream"):
        await run_to_the_end(sink)
    assert counts(store) == expected
    assert sink.stats.retries == 7
    assert unreliable.tokens[0] == unreliable.tokens[1]  # so that the store can tell the rows are the same
    assert len([r for r in caplog.records if "trying again" in r.message]) == 1  # not a line for each try


@pytest.mark.usefixtures("impatient")
async def test_stopped_while_the_store_is_down(log, settings, store, monkeypatch, caplog):
    monkeypatch.setattr(sink_module, "DRAIN_S", 0.3)
    expected = publish(log, settings, 2)
    broken = Unreliable(store)
    broken.before = 10**9
    stop = asyncio.Event()
    running = asyncio.create_task(Sink(log, broken, settings, flush_s=0.01).run(stop))
    await eventually(lambda: len(broken.tokens) > 2)
    stop.set()
    async with asyncio.timeout(5):
        await running
    assert "stopped before the end of the log" in caplog.text
    assert counts(store)["tasks"] == 0
    await run_to_the_end(Sink(log, store, settings))
    assert counts(store) == expected


@pytest.mark.usefixtures("impatient")
async def test_polls_no_more_than_it_can_hold_while_the_store_is_down(log, settings, store):
    publish(log, settings, 60)
    broken = Unreliable(store)
    broken.before = 10**9
    stop = asyncio.Event()
    sink = Sink(log, broken, settings, flush_s=0.01)
    running = asyncio.create_task(sink.run(stop))
    await eventually(lambda: len(broken.tokens) > 5)
    assert len(set(broken.tokens)) == 1  # the same rows again and again
    assert sum(map(len, sink._held.values())) <= settings.span_batch_size
    broken.before = 0
    await eventually(lambda: counts(store)["rollouts"] == 60)
    stop.set()
    await running


@on_each_log
async def test_sinks_share_the_work_and_take_over_from_each_other(log, settings, store):
    stops = [asyncio.Event() for _ in range(3)]
    sinks = [Sink(log, store, settings, flush_s=0.03) for _ in stops]
    running = []
    spans = 0
    for sink, stop in zip(sinks, stops, strict=True):
        running.append(asyncio.create_task(sink.run(stop)))
        spans += publish(log, settings, 20)["spans"]
        await eventually(lambda sink=sink: sink._consumer.assignment())
    for stop, task in zip(stops[:2], running[:2], strict=True):
        spans += publish(log, settings, 20)["spans"]
        stop.set()
        await task
    read = {Partition(topic.name, n) for topic in settings.topics.all for n in range(topic.partitions)}
    await eventually(lambda: sinks[2]._consumer.assignment() == read)
    stops[2].set()
    await running[2]
    assert counts(store)["rollouts"] == 100
    assert counts(store)["spans"] == spans
    successor = Sink(log, store, settings)
    await run_to_the_end(successor)
    assert successor.stats.records == 0


async def test_a_log_made_anew_does_not_look_like_the_old_one(settings, store):
    """Its offsets begin at 0 again: the rows of a second run in the same folder are not those of the first."""
    for _ in range(2):
        log = MemoryLog(settings.topics)
        publish(log, settings, 3)
        await run_to_the_end(Sink(log, store, settings))
    assert counts(store)["rollouts"] == 6
