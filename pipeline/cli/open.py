"""Opens the log and the store for commands."""

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from millstream.producers.log_lines import write_logs, writes_logs
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.ids import LEAST_OF_AN_ID, matching_ids

if TYPE_CHECKING:
    from millstream.consumers.log.port import Log
    from millstream.pipeline.store.clickhouse import ClickHouseStore
    from millstream.schemas.config.settings import Settings

T = TypeVar("T")

PART_OF_UUID: Final = re.compile(r"[0-9a-f-]{4,35}")
SHOWN_IDS: Final = 5
OF_PART: Final = """
SELECT DISTINCT {what}_id FROM tasks
WHERE startsWith({what}_id, {{part:String}}) OR endsWith({what}_id, {{part:String}})
ORDER BY {what}_id = {{part:String}} DESC LIMIT 100
"""


def open_settings(**overrides: Any) -> "Settings":
    """`load_settings`, and log lines as the settings say."""
    from millstream.schemas.config.settings import load_settings  # slow to import, as are the log and the store

    settings = load_settings(**overrides)
    if writes_logs():  # not if a program calls a command
        write_logs(settings.log_level, settings.log_format)
    return settings


def with_log(settings: "Settings", work: "Callable[[Log], Awaitable[T]]") -> T:
    """Checks the log, and returns what ``work`` returns. Raises as `Log.check` does if the log can't be used."""
    import asyncio

    from millstream.consumers.log.kafka_log import KafkaLog

    async def run() -> T:
        log = KafkaLog(settings)
        await log.check()
        return await work(log)

    return asyncio.run(run())


def whole_id(store: "ClickHouseStore", wanted: str, what: Literal["rollout", "group"] = "rollout") -> str:
    """An id from a part of it that begins or ends no other id. Raises `StoreError` if the store has none like it, and
    `ConfigError` for several."""
    query = OF_PART.format(what=what)
    found = matching_ids(wanted, (row[0] for row in store.sql(query, {"part": wanted}).rows))
    if len(found) > 1:
        shown = ", ".join(found[:SHOWN_IDS])
        raise ConfigError(f"{wanted} is part of the ids of {len(found)} {what}s or more, such as {shown}")
    if not found or (found[0] != wanted and len(wanted) < LEAST_OF_AN_ID):
        raise StoreError(f"the store has no {what} {wanted!r}: `millstream rollouts` lists them")
    return found[0]


def completed_id(settings: "Settings", wanted: str, what: Literal["rollout", "group"] = "rollout") -> str:
    """`whole_id` for commands that ask the log: what is not a part of a UUID stays as it is, as a whole one does."""
    if not PART_OF_UUID.fullmatch(wanted):
        return wanted
    try:
        with open_store(settings) as store:
            return whole_id(store, wanted, what)
    except StoreError as error:
        raise ConfigError(f"{wanted} is not a whole id, and can't be completed: {error}") from error


@contextmanager
def open_store(settings: "Settings") -> Iterator["ClickHouseStore"]:
    """Closes the store after the block."""
    from millstream.pipeline.store.clickhouse import ClickHouseStore

    store = ClickHouseStore(settings)
    try:
        yield store
    finally:
        store.close()
