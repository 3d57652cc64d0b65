"""The sink in front of a ClickHouse server that is away, slow, full, forgetful or right to refuse."""

import asyncio
import logging
import time
from dataclasses import replace
from uuid import uuid4

import factories
import pytest
from clickhouse_http import ClickHouseHttp, Engine
from sink_rig import IMPATIENT, counts, eventually, publish, role, run_to_the_end

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.bad_rows import BAD_ROWS
from millstream.consumers.sink.clickhouse import ClickHouseSink
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.sink import SinkRole
from millstream.pipeline.services.health import Health
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.schemas.config.settings import load_settings
from millstream.schemas.wire.log import Partition


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The one embedded engine that a process can have, which keeps its data however often the server stops."""
    held = Engine(tmp_path_factory.mktemp("store"))
    yield held
    held.close()


@pytest.fixture
def server(engine):
    front = ClickHouseHttp(engine)
    front.start()
    yield front
    front.gate.set()
    front.stop()


def connected(server, make=load_settings, **options):
    timeout = "?compress=0&send_receive_timeout=1"  # seconds that the client waits for an answer
    return make(
        clickhouse_dsn=f"clickhouse://127.0.0.1:{server.port}{timeout}",
        clickhouse_database=f"d{uuid4().hex}",
        kafka_partitions=3,
        **{"span_batch_size": 100} | options,
    )


def opened(settings):
    writer = ClickHouseWriter(settings)
    writer.migrate()
    return writer, ClickHouseStore(settings)


@pytest.fixture
def settings(server):
    return connected(server)


@pytest.fixture
def log(settings):
    return MemoryLog(settings.topics, encode=True)


@pytest.mark.kafka
async def test_a_server_that_is_down_costs_nothing_but_time(server, kafka_settings):
    settings = connected(server, kafka_settings)
    writer, store = opened(settings)
    log = KafkaLog(settings)
    await log.create_topics()
    stop = asyncio.Event()
    health = Health(log.polls, stop)
    sink = role(log, writer, settings, age_s=0.01)
    health.trouble = lambda: sink.trouble
    running = asyncio.create_task(sink.run(stop))
    expected = publish(log, settings, 3)
    await eventually(lambda: counts(store) == expected)
    members = await group_members(log, settings)
    assert health.answer("/readyz") == (200, b"ready\n")

    server.stop()
    lost = publish(log, settings, 40)
    await eventually(lambda: sink.stats.retries > 3)
    ready, why = health.answer("/readyz")
    assert ready == 503
    assert b"records have been waiting for" in why
    assert f"127.0.0.1:{server.port}".encode() in why
    assert b"Connection refused" in why
    assert len(why) < 300  # and not the whole request
    assert sink.outage_s > 0
    assert all(time.monotonic() - poll.last_poll < 1 for poll in log.polls())  # it goes on polling …
    assert sink.waiting <= 2 * settings.span_batch_size  # … and holds no more than this
    assert not running.done()

    server.start()
    total = {view: n + lost[view] for view, n in expected.items()}
    await eventually(lambda: counts(store) == total | {"dead_letters": 0})
    await eventually(lambda: sink.trouble is None)
    assert health.answer("/readyz")[0] == 200
    assert await group_members(log, settings) == members  # no member joined or left, nothing was reassigned
    stop.set()
    await running
    successor = role(log, writer, settings)
    await run_to_the_end(successor)
    assert successor.stats.records == 0
    store.close()
    writer.close()


async def group_members(log, settings):
    from confluent_kafka.admin import AdminClient

    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    group = f"{settings.topic_prefix}.sink"
    described = await asyncio.to_thread(admin.describe_consumer_groups([group])[group].result, 10)
    return [member.member_id for member in described.members]


async def test_a_reply_that_is_lost_stores_the_block_once(server, log, settings, writer, store):
    server.execute("SYSTEM STOP MERGES spans_raw", database=settings.clickhouse_database)
    task, producer = factories.task(), log.producer()
    for n in range(50):
        producer.send(settings.topics.events, factories.span(task, "a", sequence=n), partition=1)
    server.lose_replies = 7  # the client itself sends twice
    await run_to_the_end(role(log, writer, settings))
    assert len(server.tokens) == 8
    assert len(set(server.tokens)) == 1  # what is sent again says that it is the same …
    assert store.sql("SELECT count() FROM spans_raw").rows == [(50,)]  # … and is not even stored
    assert counts(store)["spans"] == 50


REFUSALS = {
    "full of parts": "Code: 252. DB::Exception: Too many parts (3000). (TOO_MANY_PARTS)",
    "out of memory": "Code: 241. DB::Exception: Memory limit (total) exceeded. (MEMORY_LIMIT_EXCEEDED)",
    "disk full": "Code: 243. DB::Exception: Cannot reserve 1.00 MiB, not enough space. (NOT_ENOUGH_SPACE)",
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
async def test_what_a_server_cannot_take_now_it_gets_later(server, log, settings, writer, store, refusal, caplog):
    expected = publish(log, settings, 5)
    server.refusal, server.refuse = refusal, 6
    sink = role(log, writer, settings)
    with caplog.at_level(logging.WARNING, logger="millstream"):
        await run_to_the_end(sink)
    assert counts(store) == expected  # no dead letters among it
    assert sink.stats.retries == 6
    assert len([r for r in caplog.records if "retrying" in r.message]) == 1  # not a line for each try


async def test_a_server_that_does_not_answer_in_time(server, log, settings, writer, store):
    expected = publish(log, settings, 5)
    server.gate.clear()
    stop = asyncio.Event()
    sink = role(log, writer, settings, age_s=0.01, outage=replace(IMPATIENT, slow_s=0.1))
    running = asyncio.create_task(sink.run(stop))
    await eventually(lambda: sink.trouble is not None)
    assert "the store does not answer" in sink.trouble  # before any time-out
    await eventually(lambda: sink.stats.retries)
    assert "timed out" in sink.trouble
    server.gate.set()
    await eventually(lambda: counts(store) == expected)
    stop.set()
    await running


async def test_one_bad_row_among_thousands_goes_to_dead_alone(server):
    settings = connected(server, span_batch_size=5000)
    writer, store = opened(settings)
    constraint = "ALTER TABLE spans_raw ADD CONSTRAINT known CHECK SpanName != 'unheard-of'"
    server.execute(constraint, database=settings.clickhouse_database)
    log = MemoryLog(settings.topics, encode=True)
    task, producer = factories.task(), log.producer()
    for n in range(5000):
        name = "unheard-of" if n == 3210 else "work"
        producer.send(settings.topics.events, factories.span(task, "a", sequence=n, name=name), partition=1)
    sink = role(log, writer, settings, age_s=60.0)
    await run_to_the_end(sink)
    assert counts(store)["spans"] == 4999
    (letter,) = store.sql("SELECT source_topic, source_offset, role, reason, error FROM dead_letters").rows
    assert letter[:4] == (settings.topics.events, 3210, "sink", "unstorable")
    assert "Constraint `known`" in letter[4]
    assert "VIOLATED_CONSTRAINT" in letter[4]
    assert len(server.tokens) < 40  # by halves, not row by row
    assert len(set(server.tokens)) == len(server.tokens)
    store.close()
    writer.close()


async def test_a_crash_between_insert_and_commit_shows_nowhere(log, settings, writer, store):
    class Crashing(ClickHouseSink):
        def flush(self):
            raise SystemError("killed")

    expected = publish(log, settings, 20)
    with pytest.raises(SystemError, match="killed"):
        await run_to_the_end(SinkRole(log, Crashing(writer, settings.topics.events), settings))
    stored = store.sql("SELECT count() FROM spans_raw").rows[0][0]
    assert stored > 0
    await run_to_the_end(role(log, writer, settings, rows=70))  # other batches, so other tokens
    assert counts(store) == expected
    assert store.sql("SELECT count(), uniqExact(Partition, Offset) FROM spans").rows == [(80, 80)]


async def test_holds_no_more_than_two_batches_while_the_server_is_down(server, log, settings, writer, store):
    publish(log, settings, 60)
    server.refuse = 10**9
    stop = asyncio.Event()
    sink = role(log, writer, settings, age_s=0.01)
    running = asyncio.create_task(sink.run(stop))
    await eventually(lambda: len(server.tokens) > 8)
    assert len(set(server.tokens)) == 1  # the same rows again and again
    assert sink.waiting <= 2 * settings.span_batch_size
    server.refuse = 0
    await eventually(lambda: counts(store)["rollouts"] == 60)
    stop.set()
    await running


async def test_stopped_while_the_server_is_down(server, log, settings, writer, store, caplog):
    expected = publish(log, settings, 2)
    server.refuse = 10**9
    stop = asyncio.Event()
    running = asyncio.create_task(role(log, writer, settings, age_s=0.01, drain_s=0.3).run(stop))
    await eventually(lambda: len(server.tokens) > 2)
    stop.set()
    async with asyncio.timeout(5):
        await running
    assert "stopped before the end of the log" in caplog.text
    assert counts(store)["tasks"] == 0
    server.refuse = 0
    await run_to_the_end(role(log, writer, settings))
    assert counts(store) == expected


@pytest.mark.kafka
async def test_partitions_lost_during_an_outage_are_their_new_owners(server, kafka_settings):
    settings = connected(server, kafka_settings)
    writer, store = opened(settings)
    log = KafkaLog(settings)
    await log.create_topics()
    expected = publish(log, settings, 10)
    server.refuse = 10**9
    stops = [asyncio.Event(), asyncio.Event()]
    first, second = (role(log, writer, settings, age_s=0.01) for _ in stops)
    tasks = [asyncio.create_task(first.run(stops[0]))]
    await eventually(lambda: first.stats.retries)
    tasks.append(asyncio.create_task(second.run(stops[1])))
    await eventually(
        lambda: second._consumer.assignment() and not second._consumer.assignment() & set(first._in_flight)
    )
    server.refuse = 0
    await eventually(lambda: counts(store) == expected)
    for stop in stops:
        stop.set()
    await asyncio.gather(*tasks)
    assert counts(store) == expected
    events = [Partition(settings.topics.events, n) for n in range(3)]
    consumer = log.consumer(f"{settings.topic_prefix}.sink")
    committed, ends = await consumer.committed(events), await consumer.end_offsets(events)
    await consumer.close()
    assert all(ends[p] - (committed[p] or 0) <= 1 for p in events)  # a transaction's marker is no record


def test_the_codes_of_bad_rows_are_clickhouses(store):
    for code, name in BAD_ROWS.items():
        assert store.sql(f"SELECT errorCodeToName({code})").rows == [(name,)]
