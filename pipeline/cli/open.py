"""Opens the log and the store for commands."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.port import Log
from millstream.producers.log_lines import write_logs, writes_logs
from millstream.schemas.config.settings import Settings, load_settings

if TYPE_CHECKING:
    from millstream.pipeline.store.clickhouse import ClickHouseStore

T = TypeVar("T")


def open_settings(**overrides: Any) -> Settings:
    """`load_settings`, and log lines as the settings say."""
    settings = load_settings(**overrides)
    if writes_logs():  # not if a program calls a command
        write_logs(settings.log_level, settings.log_format)
    return settings


def with_log(settings: Settings, work: Callable[[Log], Awaitable[T]]) -> T:
    """Checks the log, and returns what ``work`` returns. Raises as `Log.check` does if the log can't be used."""

    async def run() -> T:
        log = KafkaLog(settings)
        await log.check()
        return await work(log)

    return asyncio.run(run())


@contextmanager
def open_store(settings: Settings) -> Iterator["ClickHouseStore"]:
    """Closes the store after the block."""
    from millstream.pipeline.store.clickhouse import ClickHouseStore  # slow to import: not for other commands

    store = ClickHouseStore(settings)
    try:
        yield store
    finally:
        store.close()
