"""A store made anew from the log is the store that a sink made."""

import asyncio

import pytest
from factories import event, reward, span, task

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.clickhouse import ClickHouseSink
from millstream.consumers.sink.rows import TABLES
from millstream.consumers.sink.sink import SinkRole
from millstream.pipeline.store import rebuild as rebuild_module
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.store.rebuild import rebuild
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError


@pytest.mark.parametrize("encode", [False, True], ids=["live", "encoded"])
async def test_a_rebuilt_store_is_the_one_that_a_sink_made(tmp_path, monkeypatch, encode):
    monkeypatch.setattr(rebuild_module, "BATCH_RECORDS", 50)
    monkeypatch.setattr(rebuild_module, "BATCH_BYTES", 5000)
    dsn = f"chdb://{tmp_path}/store"
    made, anew = (
        load_settings(clickhouse_dsn=dsn, clickhouse_database=name, kafka_partitions=3) for name in ("made", "anew")
    )
    topics = made.topics
    log = MemoryLog(topics, encode=encode)
    producer = log.producer()
    for _ in range(40):
        of = task()
        producer.send(topics.tasks("low"), of)
        for record in (event(of, "a", "preparing"), span(of, "a"), reward(of, "a", 0.5), event(of, "a", "succeeded")):
            producer.send(topics.events, record, key=of.rollout_id)
    producer.send(topics.tasks("high"), b"garbage", partition=1)
    original, copy = ClickHouseStore(made), ClickHouseStore(anew)
    try:
        original.migrate()
        stop = asyncio.Event()
        stop.set()
        await SinkRole(log, ClickHouseSink(original, made.topics.events), made).run(stop)
        records, unusable = await rebuild(log, copy, topics)
        assert (records, unusable) == (40 * 5 + 2, 1)  # with the garbage's dead letter
        for table in [*(table.name for table in TABLES.values()), "spans_raw", "token_ids_raw"]:
            rows = [sorted(map(str, one.sql(f"SELECT * FROM {table} FINAL").rows)) for one in (original, copy)]
            assert rows[0] == rows[1], table
        with pytest.raises(ConfigError, match=r"isn't empty \(tasks_raw, attempts_raw, "):
            await rebuild(log, copy, topics)
        again = SinkRole(log, ClickHouseSink(original, made.topics.events), made)
        await again.run(stop)
        assert again.stats.records == 0  # the sinks' group was left alone
    finally:
        original.close()
        copy.close()
