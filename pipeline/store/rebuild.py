"""Fills an empty store from the log."""

import asyncio
import secrets
from contextlib import aclosing

from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.consumers.sink.clickhouse import ClickHouseSink
from millstream.consumers.sink.port import Batch
from millstream.consumers.sink.rows import TABLES
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.topics import Topics

BATCH_RECORDS = 10_000
BATCH_BYTES = 32 << 20


async def rebuild(log: Log, store: ClickHouseStore, topics: Topics) -> tuple[int, int]:
    """Everything that the topics hold by now, into the store. Returns how many records it has taken, and how many of
    those have no row: their dead letters are on the log already, and go into the store with the rest.

    The sinks' group isn't touched: a sink that is started afterwards goes on where the last one ended, and what both
    store is there once. Raises `ConfigError` if the store isn't empty.
    """
    store.migrate()
    tables = [*(table.name for table in TABLES.values()), "spans_raw"]
    if filled := [name for name in tables if store.sql(f"SELECT 1 FROM {name} LIMIT 1").rows]:  # noqa: S608
        raise ConfigError(f"the store isn't empty ({', '.join(filled)}): name another clickhouse_database")
    partitions = [Partition(topic.name, n) for topic in topics.all for n in range(topic.partitions)]
    sink = ClickHouseSink(store, topics.events)

    def write() -> int:
        # A token of its own, not one made of offsets: a store that was emptied would take the rows for old ones.
        return len(sink.write(Batch(batch, secrets.token_hex(32))))

    records = unusable = size = 0
    batch: list[LogRecord] = []
    async with aclosing(read_to_end(log, partitions)) as found:
        async for record in found:
            batch.append(record)
            size += len(record.value) if isinstance(record.value, bytes) else 0
            if len(batch) >= BATCH_RECORDS or size >= BATCH_BYTES:
                unusable += await asyncio.to_thread(write)
                records, size, batch = records + len(batch), 0, []
    unusable += await asyncio.to_thread(write)
    return records + len(batch), unusable
