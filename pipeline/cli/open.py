"""What commands ask: the log, once it has answered, and the store."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.port import Log
from millstream.schemas.config.settings import Settings

if TYPE_CHECKING:
    from millstream.pipeline.store.clickhouse import ClickHouseStore

T = TypeVar("T")


def with_log(settings: Settings, work: Callable[[Log], Awaitable[T]]) -> T:
    """What ``work`` comes to. Raises as `Log.check` does if the log can't be used."""

    async def run() -> T:
        log = KafkaLog(settings)
        await log.check()
        return await work(log)

    return asyncio.run(run())


@contextmanager
def open_store(settings: Settings) -> Iterator["ClickHouseStore"]:
    """For as long as the body runs."""
    from millstream.pipeline.store.clickhouse import (
        ClickHouseStore,  # takes a while to import, which other commands are spared
    )

    store = ClickHouseStore(settings)
    try:
        yield store
    finally:
        store.close()
