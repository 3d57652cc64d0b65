"""What the pages read: the store, and the log if there is one."""

import threading
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from millstream.consumers.log.port import Log
from millstream.pipeline.services.fleet_load import FleetLoadReader
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.producers.log.port import Producer, closing
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import LogUnavailable, StoreError

T = TypeVar("T")

SQL_ROWS: Final = 1000  # of the user's own statements; a page of more is of no use
# Of a statement that a user writes, in ClickHouse's settings: what it may cost the process that runs it.
SQL_LIMITS: Final[dict[str, int | str]] = {
    "max_execution_time": 20,  # seconds
    "max_result_rows": SQL_ROWS,
    "max_result_bytes": 32 << 20,
    "result_overflow_mode": "break",
    "max_memory_usage": 2 << 30,
}


class Source:
    """Reads for the pages. Any thread may use the stores; coroutines belong to the loop that serves the pages.

    ``log``: None if there is none. ``no_store``: why the store can't be opened here; empty if it can. ``ends``: whether
    the server is to stop, so that streams have to end."""

    def __init__(self, settings: Settings, log: Log | None = None, *, no_store: str = "") -> None:
        self.settings = settings
        self.no_store = no_store
        self.ends: Callable[[], bool] = bool
        self._log = log
        self._lock = threading.Lock()
        self._stores: dict[bool, ClickHouseStore] = {}  # by whether limits hold
        self._load = None if log is None else FleetLoadReader(log, settings.topics)

    @property
    def has_log(self) -> bool:
        return self._log is not None

    @property
    def store(self) -> ClickHouseStore:
        """Opened at the first use; a store that is not there yet is tried again at the next. Raises `StoreError`."""
        return self._opened(limited=False)

    @property
    def sql_store(self) -> ClickHouseStore:
        """The same for statements of users, within `SQL_LIMITS`. Reads no files and no addresses."""
        return self._opened(limited=True)

    def _opened(self, limited: bool) -> ClickHouseStore:
        if self.no_store:
            raise StoreError(self.no_store)
        with self._lock:
            if limited not in self._stores:
                self._stores[limited] = ClickHouseStore(self.settings, limits=SQL_LIMITS if limited else None)
            return self._stores[limited]

    @property
    def log(self) -> Log:
        """Raises `LogUnavailable` if there is none."""
        if self._log is None:
            raise LogUnavailable("these pages show the store alone: Kafka did not answer when they were started")
        return self._log

    async def written(self, work: Callable[[Producer], Awaitable[T]]) -> T:
        """What ``work`` returns with a producer, which is closed afterwards. Raises `LogError`."""
        async with closing(self.log.producer()) as producer:
            return await work(producer)

    async def load(self) -> dict[str, object] | None:
        """What waits and who works; None without a log. Raises `LogError`."""
        return None if self._load is None else (await self._load.read()).to_json()

    def close(self) -> None:
        with self._lock:
            for store in self._stores.values():
                store.close()
            self._stores.clear()
