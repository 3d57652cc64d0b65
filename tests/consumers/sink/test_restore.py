"""A store that was lost is filled again from an older copy and the log, as `docs/operations.md` says."""

from uuid import uuid4

from sink_rig import publish, role, run_to_the_end

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.schemas.config.settings import load_settings


async def test_a_sink_of_a_new_name_fills_a_copy_with_what_it_lacks(folder):
    lost, again = (
        load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{uuid4().hex}", kafka_partitions=2)
        for _ in range(2)
    )
    log = MemoryLog(lost.topics, encode=True)
    writers = [ClickHouseWriter(settings) for settings in (lost, again)]
    for writer in writers:
        writer.migrate()
    publish(log, lost, 20)
    # The copy holds what the store held at that time.
    await run_to_the_end(role(log, writers[0], lost), role(log, writers[1], again, name="copied"))
    publish(log, lost, 30)
    await run_to_the_end(role(log, writers[0], lost))
    await run_to_the_end(role(log, writers[1], again, name="restored"))
    stores = [ClickHouseStore(settings) for settings in (lost, again)]
    query = f"SELECT name FROM system.tables WHERE database = '{lost.clickhouse_database}' AND engine = 'View'"
    views = [name for (name,) in stores[0].sql(query).rows]
    assert len(views) > 15
    for view in views:
        rows, restored = (sorted(map(repr, store.sql(f"SELECT * FROM {view}").rows)) for store in stores)
        assert rows == restored, view
    assert stores[1].sql("SELECT count() FROM rollouts").rows == [(50,)]
    for opened in (*stores, *writers):
        opened.close()
