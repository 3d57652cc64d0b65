import asyncio
from uuid import uuid4

import factories
import pytest
from sink_rig import counts, eventually, publish, role, run_to_the_end

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.rows import TABLES
from millstream.schemas.config.settings import load_settings
from millstream.schemas.wire.log import Partition


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
async def log(settings, kind):
    made = KafkaLog(settings) if kind == "kafka" else MemoryLog(settings.topics, encode=kind == "encoded")
    await made.create_topics()
    return made


@on_each_log
async def test_the_store_has_all_records_of_the_topics(log, settings, writer, store, caplog):
    expected = publish(log, settings, 60)
    sink = role(log, writer, settings)
    await run_to_the_end(sink)
    assert counts(store) == expected
    assert store.sql("SELECT status, count(), sum(reward) FROM rollouts GROUP BY status").rows == [
        ("succeeded", 60, 30.0)
    ]
    assert "stopped before the end" not in caplog.text
    assert sink.stats.flushes > 5  # of at most 100 records each
    assert sink.stats.records == 60 * (1 + 4 + 5 + 1 + 2) + 1


@on_each_log
async def test_rows_are_stored_once_they_are_old(log, settings, writer, store):
    stop = asyncio.Event()
    sink = role(log, writer, settings, age_s=0.05)
    running = asyncio.create_task(sink.run(stop))
    expected = publish(log, settings, 2)
    await eventually(lambda: counts(store) == expected)
    more = publish(log, settings, 1)
    stop.set()
    await running
    assert counts(store) == {view: n + (more[view] if view != "dead_letters" else 0) for view, n in expected.items()}


@on_each_log
async def test_a_restart_continues_where_the_last_sink_ended(log, settings, writer, store):
    first, second, third = (role(log, writer, settings) for _ in range(3))
    publish(log, settings, 3)
    await run_to_the_end(first)
    expected = publish(log, settings, 2)
    await run_to_the_end(second)
    await run_to_the_end(third)
    assert (second.stats.records, third.stats.records) == (2 * 13 + 1, 0)
    assert counts(store)["rollouts"] == 5
    assert counts(store)["spans"] == 12 + expected["spans"]


@on_each_log
async def test_what_cannot_be_decoded_is_a_dead_letter_and_the_rest_is_stored(log, settings, writer, store):
    topics = settings.topics
    expected = publish(log, settings, 2)
    producer = log.producer()
    producer.send(topics.tasks("high"), b"garbage", key="k", partition=0, headers={"h": b"\xfe"})
    producer.send(topics.events, b"more garbage", key="k")  # the adapter sends its dead letter
    producer.send(topics.dead, b"\xc3\x01nothing known", key=None)
    producer.close(20.0)
    sink = role(log, writer, settings)
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
    again = role(log, writer, settings)
    await run_to_the_end(again)
    assert again.stats.records == 0


async def test_a_sink_of_another_name_fills_an_empty_store_from_the_log(settings, writer, store):
    log = MemoryLog(settings.topics, encode=True)
    publish(log, settings, 40)
    log.producer().send(settings.topics.tasks("high"), b"garbage", partition=1)
    await run_to_the_end(role(log, writer, settings))
    other = settings.model_copy(update={"clickhouse_database": f"{settings.clickhouse_database}_second"})
    second = ClickHouseWriter(other)
    second.migrate()
    await run_to_the_end(role(log, second, other, name="second"))
    for table in [*(table.name for table in TABLES.values()), "spans_raw", "token_ids_raw"]:
        rows = [sorted(map(str, w.client.query(f"SELECT * FROM {table} FINAL").result_rows)) for w in (writer, second)]
        assert rows[0] == rows[1] if table != "dead_letters_raw" else rows[0]
    again = role(log, writer, settings)
    await run_to_the_end(again)
    assert again.stats.records == 1  # the dead letter of the other sink: the groups are independent
    second.close()


async def test_a_dead_letter_keeps_a_key_that_is_not_text(log, settings, writer, store):
    key = b"\xff\x00k"
    log.producer().send(
        settings.topics.tasks("low"), b"garbage", key=key.decode("utf-8", "surrogateescape"), partition=2
    )
    await run_to_the_end(role(log, writer, settings))
    assert store.sql("SELECT hex(key) FROM dead_letters").rows == [(key.hex().upper(),)]


async def test_a_record_in_memory_that_no_column_holds_is_a_dead_letter(settings, writer, store):
    log = MemoryLog(settings.topics)
    task = factories.task()
    spans = [factories.span(task, "a", sequence=n, end=1 << 63 if n == 37 else 2) for n in range(80)]
    for span in spans:
        log.producer().send(settings.topics.events, span, partition=1)
    await run_to_the_end(role(log, writer, settings))
    assert counts(store)["spans"] == 79
    assert store.sql("SELECT source_offset, reason FROM dead_letters").rows == [(37, "unstorable")]


@pytest.mark.parametrize("kind", [pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True)
async def test_sinks_share_the_work_and_take_over_from_each_other(log, settings, writer, store):
    stops = [asyncio.Event() for _ in range(3)]
    sinks = [role(log, writer, settings, age_s=0.03) for _ in stops]
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
    read = {Partition(topic.name, n) for topic in settings.topics.stored for n in range(topic.partitions)}
    await eventually(lambda: sinks[2]._consumer.assignment() == read)
    stops[2].set()
    await running[2]
    assert counts(store)["rollouts"] == 100
    assert counts(store)["spans"] == spans
    successor = role(log, writer, settings)
    await run_to_the_end(successor)
    assert successor.stats.records == 0


async def test_a_recreated_log_does_not_look_like_the_old_one(settings, writer, store):
    """Its offsets begin at 0 again: the rows of a second run in the same folder are not those of the first."""
    for _ in range(2):
        log = MemoryLog(settings.topics)
        publish(log, settings, 3)
        await run_to_the_end(role(log, writer, settings))
    assert counts(store)["rollouts"] == 6
