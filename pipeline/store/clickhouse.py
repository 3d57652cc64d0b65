"""The store of a deployment: reads ClickHouse, embedded in this process or a server."""

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, Final, Unpack

from millstream.consumers.log.port import Log
from millstream.consumers.sink.clickhouse_connection import EMBEDDED, address, connect, readable, store_errors
from millstream.consumers.sink.clustered import LOOK_HERE
from millstream.pipeline.store import queries
from millstream.pipeline.store.follow import follow_spans
from millstream.pipeline.store.read_only import FORMAT_QUERY, reading_statement
from millstream.pipeline.store.results import (
    Attempt,
    Result,
    Reward,
    Rollout,
    RolloutFilters,
    RolloutOrder,
    Store,
    TripletFilters,
    checked,
    checked_order,
)
from millstream.schemas.config.settings import Settings
from millstream.schemas.control import Resources
from millstream.schemas.errors import StoreError
from millstream.schemas.wire.records import Span, Triplet

COPIED_BYTES: Final = 1 << 20  # of an export, at once
READ_ONLY: Final = 2  # ClickHouse's `readonly`: no writes and no DDL, but a query may have settings of its own
READ_ONLY_AS_IS: Final = 1  # nor those; most table functions are refused, too


class ClickHouseStore(Store):
    """A connection for reading. Any thread may call its methods.

    ``follow`` reads ``log``; None: the Kafka of the settings. ``limits``: settings of ClickHouse for each statement,
    which then can't change any, nor read files and other servers. Raises `StoreError` if the server does not answer, if
    an embedded store's folder holds none (reading creates nothing), or if another process holds it.
    """

    def __init__(
        self, settings: Settings, log: Log | None = None, *, limits: Mapping[str, int | str] | None = None
    ) -> None:
        if limits is None:  # the process that holds an embedded store has limits of its own
            settings = readable(settings)
        self._settings = settings
        self._log = log
        self._reading = lru_cache(maxsize=256)(self._parse)  # the same statements are repeated
        self._has_database = False
        self._client = connect(settings, create=False)
        with store_errors(settings, "can't be opened"):
            if self._client.query("SELECT getSetting('readonly')").result_rows == [(0,)]:
                for name, value in {**(limits or {}), **(LOOK_HERE if settings.clickhouse_cluster else {})}.items():
                    self._client.set_client_setting(name, value)
                self._client.set_client_setting("readonly", READ_ONLY if limits is None else READ_ONLY_AS_IS)

    def rollouts(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        sort_by: RolloutOrder = "created_at",
        descending: bool = True,
        limit: int | None = None,
        offset: int = 0,
        **filters: Unpack[RolloutFilters],
    ) -> list[Rollout]:
        direction = "DESC" if descending else "ASC"
        wanted: Mapping[str, Any] = {"rollout_id": rollout_ids, **checked(filters, RolloutFilters)}
        order = f"{checked_order(sort_by)} {direction} NULLS LAST, rollout_id {direction}"
        if limit is not None:
            wanted, offset = queries.narrowed(
                self._ask, wanted, sort_by=sort_by, direction=direction, limit=limit, offset=offset
            )
        return queries.read(self._ask, Rollout, "rollouts", wanted, order=order, limit=limit, offset=offset)

    def attempts(self, rollout_id: str) -> list[Attempt]:
        filters = {"rollout_id": rollout_id}
        return queries.read(self._ask, Attempt, "attempts", filters, order="attempt, started_at, attempt_id")

    def spans(self, rollout_id: str, *, attempt_id: str | None = None) -> list[Span]:
        return queries.read_spans(self._ask, {"rollout_id": rollout_id, "attempt_id": attempt_id})

    def triplets(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        limit: int | None = None,
        **filters: Unpack[TripletFilters],
    ) -> list[Triplet]:
        wanted = {"rollout_id": rollout_ids, **checked(filters, TripletFilters)}
        return queries.read_triplets(self._ask, wanted, limit)

    def rewards(
        self, rollout_ids: Sequence[str] | None = None, *, name: str | None = None, limit: int | None = None
    ) -> list[Reward]:
        filters = {"rollout_id": rollout_ids, "name": name}
        order = "rollout_id, attempt_id, source, sequence"
        return queries.read(self._ask, Reward, "rewards", filters, order=order, limit=limit)

    def latest_resources(self, experiment_id: str | None = None) -> Resources | None:
        return queries.read_latest_resources(self._ask, experiment_id)

    def sql(self, query: str, parameters: Mapping[str, Any] | None = None) -> Result:
        return self._ask(self._reading(query), parameters or {})

    def sql_arrow(self, query: str, parameters: Mapping[str, Any] | None = None) -> Any:
        query = self._reading(query)
        with store_errors(self._settings, "refused the query"):
            return self._client.query_arrow(query, parameters=dict(parameters or {}))

    def export(
        self,
        query: str,
        file: BinaryIO,
        file_format: str,
        parameters: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Streams the rows of a query into a file, in one of ClickHouse's formats, such as Parquet, CSVWithNames or
        JSONEachRow. ``progress`` is called with the number of bytes written so far. Raises `StoreError`; the file is
        then incomplete."""
        query = self._reading(query)
        # Without the setting, a server that fails halfway puts the error among the data.
        settings = {} if self._settings.clickhouse_dsn.startswith(EMBEDDED) else {"wait_end_of_query": 1}
        with (
            store_errors(self._settings, "refused the query"),
            self._client.raw_stream(query, dict(parameters or {}), settings, fmt=file_format) as rows,
        ):
            written = 0
            while part := rows.read(COPIED_BYTES):
                written += file.write(part)
                if progress is not None:
                    progress(written)

    def follow(self, rollout_id: str) -> AsyncIterator[Span]:
        if self._log is None:
            from millstream.consumers.log.kafka_log import KafkaLog

            self._log = KafkaLog(self._settings)
        return follow_spans(self._log, self._settings.topics, rollout_id, self)

    def _parse(self, query: str) -> str:
        return reading_statement(query, lambda text: self._ask(FORMAT_QUERY, {"query": text}).rows[0][0])

    def _ask(self, sql: str, parameters: Mapping[str, Any]) -> Result:
        with store_errors(self._settings, "refused the query"):
            self._choose_database()
            found = self._client.query(sql, parameters=dict(parameters))
            if found.column_names:
                return Result(tuple(found.column_names), [tuple(row) for row in found.result_rows])
            # The client's format has no column names if there are no rows.
            answer = self._client.raw_query(sql, parameters=dict(parameters), fmt="JSONCompact")
            return Result(tuple(column["name"] for column in json.loads(answer)["meta"]) if answer else (), [])

    def _choose_database(self) -> None:
        """Once it exists: a store may be opened before a sink has created its database."""
        if self._has_database:
            return
        database = self._settings.clickhouse_database
        if database not in self._client.query("SELECT name FROM system.databases").result_columns[0]:
            raise StoreError(
                f"{address(self._settings)} has no database {database} yet: a training run or `millstream sink` "
                "creates it"
            )
        self._client.database = database
        self._has_database = True

    def close(self) -> None:
        """Closes the connection. Another process can open an embedded store after its last connection is closed."""
        self._client.close()
