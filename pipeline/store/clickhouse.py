"""The store: ClickHouse, embedded in this process (``chdb://``) or a server (``clickhouse://``), behind one client."""

import json
import re
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Unpack
from urllib.parse import urlsplit

import clickhouse_connect
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, DataError
from clickhouse_connect.driver.httputil import get_pool_manager
from urllib3.exceptions import HTTPError

from millstream.consumers.log.port import Log
from millstream.consumers.sink.clickhouse import RowsRefused
from millstream.consumers.sink.migrations import Migration, apply_retention, locked, packaged_migrations
from millstream.pipeline.store import queries
from millstream.pipeline.store.errors import is_bad_row
from millstream.pipeline.store.follow import follow_spans
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
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import Span, Triplet

EMBEDDED = "chdb://"
SERVER = "clickhouse://"
READING = ("SELECT", "WITH", "EXPLAIN", "SHOW", "DESCRIBE", "EXISTS")
READ_ONLY = 2  # ClickHouse's `readonly`: no writes and no DDL, but a query may bring settings of its own
CANNOT_READ_ALL_DATA = 33  # ClickHouse's; that of an Avro file which is all there: a row of it breaks off


class ClickHouseStore(Store):
    """One process's connection. Every method may be called from any thread; calls that write wait for each other.

    ``log`` is what ``follow`` reads; None: the Kafka of the settings. Raises `StoreError` if nobody answers, or another
    process has the folder of an embedded store.
    """

    def __init__(self, settings: Settings, log: Log | None = None) -> None:
        self._settings = settings
        self._log = log
        self._reading = lru_cache(maxsize=256)(self._parse)  # the same question is asked again and again
        self._database = settings.clickhouse_database
        self._types: dict[str, dict[str, str]] = {}
        self._retention_days = settings.retention_days
        self._where = _without_password(settings.clickhouse_dsn)
        with self._errors("can't be opened"):
            self._writer = _connect(settings)
            self._reader = _connect(settings)  # read-only from here on; that can't be taken back
            self._reader.set_client_setting("readonly", READ_ONLY)
            known = self._writer.query("SELECT name FROM system.databases").result_columns
            if self._database in known[0]:
                self._use_database()

    def migrate(self, migrations: Sequence[Migration] | None = None) -> list[str]:
        """Brings the tables, views and retention up to date; returns the names of what was applied.

        Raises `StoreError` if the store has migrations that this version of Millstream doesn't know, or other ones.
        """
        migrations = packaged_migrations() if migrations is None else migrations
        with self._errors("can't be migrated"):
            self._writer.command(f"CREATE DATABASE IF NOT EXISTS {self._database}")
            self._use_database()
            self._writer.command(
                "CREATE TABLE IF NOT EXISTS migrations (version UInt32, name String, checksum String, "
                "applied_at DateTime64(3, 'UTC') DEFAULT now64(3)) ENGINE = MergeTree ORDER BY version"
            )
            applied = []
            if self._missing(migrations):
                with locked(self._writer, f"{self._database} in {self._where}"):
                    applied = self._missing(migrations)  # another process may have been faster
                    for migration in applied:
                        self._apply(migration)
            self._types.clear()
            apply_retention(self._writer, self._retention_days)
        return [m.name for m in applied]

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
        wanted: dict[str, Any] = {"rollout_id": rollout_ids, **checked(filters, RolloutFilters)}
        asked = {name for name, value in wanted.items() if value is not None}
        if limit is not None and sort_by == "created_at" and asked <= queries.OF_TASKS:
            # The view is then made for these alone, not for every rollout there ever was.
            wanted = {"rollout_id": queries.read_newest(self._ask, wanted, direction, limit, offset)}
            offset = 0
        order = f"{checked_order(sort_by)} {direction} NULLS LAST, rollout_id {direction}"
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
        with self._errors("refused the query"):
            return self._reader.query_arrow(query, parameters=dict(parameters or {}))

    def export(self, query: str, file: BinaryIO, file_format: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Writes what a query finds in one of ClickHouse's formats, such as Parquet, CSVWithNames or JSONEachRow, as it
        comes. Raises `StoreError`; the file is then not to be used."""
        query = self._reading(query)
        # Without the setting a server that fails half-way says so within the data.
        settings = {} if self._settings.clickhouse_dsn.startswith(EMBEDDED) else {"wait_end_of_query": 1}
        with (
            self._errors("refused the query"),
            self._reader.raw_stream(query, dict(parameters or {}), settings, fmt=file_format) as rows,
        ):
            shutil.copyfileobj(rows, file)

    def follow(self, rollout_id: str) -> AsyncIterator[Span]:
        if self._log is None:
            from millstream.consumers.log.kafka_log import KafkaLog

            self._log = KafkaLog(self._settings)
        return follow_spans(self._log, self._settings.topics, rollout_id, self)

    def first_offset(self, rollout_id: str, partition: Partition) -> int:
        """See `follow.Stored`. A rollout that isn't here yet was claimed behind everything that is: claims are stored
        in the order of their partition."""
        place = {"rollout": rollout_id, "topic": partition.topic, "partition": partition.number}
        of_topic = "FROM attempts_raw WHERE topic = {topic:String} AND partition = {partition:Int32}"
        ((claim,),) = self._ask(f"SELECT minOrNull(offset) {of_topic} AND rollout_id = {{rollout:String}}", place).rows
        if claim is None:
            ((claim,),) = self._ask(f"SELECT coalesce(maxOrNull(offset) + 1, 0) {of_topic}", place).rows
        return int(claim)

    def end_offset(self, rollout_id: str, partition: Partition) -> int | None:
        """See `follow.Stored`."""
        found = self._ask(
            "SELECT min(offset) FROM rollout_ends_raw WHERE rollout_id = {rollout:String} AND topic = {topic:String} "
            "HAVING count() > 0",
            {"rollout": rollout_id, "topic": partition.topic},
        )
        return found.rows[0][0] if found.rows else None

    def spans_before(self, rollout_id: str, offset: int) -> list[Span]:
        """See `follow.Stored`."""
        return queries.read_spans(self._ask, {"rollout_id": rollout_id}, before=offset)

    def _parse(self, query: str) -> str:
        """The statement as it may be sent. ``readonly`` alone keeps nobody from writing files (``INTO OUTFILE``,
        ``INSERT INTO FUNCTION file(…)``) or from changing the database for whoever asks next (``USE``): the engine's
        own parser says what it is. Raises `StoreError` unless it is one statement that reads."""
        ((parsed,),) = self._ask("SELECT formatQuery({query:String})", {"query": query}).rows
        lines = parsed.split("\n")
        verb = lines[0].split(maxsplit=1)[0]
        if verb not in READING:
            raise StoreError(f"the store only answers questions ({', '.join(READING)}); this is readonly: no {verb}")
        if any(line.startswith(("INTO OUTFILE", "FORMAT ")) for line in lines):
            raise StoreError("a question to the store names no INTO OUTFILE and no FORMAT: see `millstream export`")
        return query.strip().removesuffix(";")

    def _ask(self, sql: str, parameters: Mapping[str, Any]) -> Result:
        with self._errors("refused the query"):
            if self._reader.database is None:
                raise StoreError(
                    f"{self._where} has no database {self._database} yet: a training run or `millstream sink` makes it"
                )
            found = self._reader.query(sql, parameters=dict(parameters))
            if found.column_names:
                return Result(tuple(found.column_names), [tuple(row) for row in found.result_rows])
            # The client's format names no columns where there are no rows.
            answer = self._reader.raw_query(sql, parameters=dict(parameters), fmt="JSONCompact")
            return Result(tuple(column["name"] for column in json.loads(answer)["meta"]) if answer else (), [])

    def insert(self, table: str, column_names: Sequence[str], columns: Sequence[Sequence[Any]], token: str) -> None:
        """Inserts columns of equal length at once. The same token again is dropped, whatever the rows are.

        Raises `RowsRefused` if a row can't be what the table holds: sending it again can't help.
        """
        with self._errors(f"did not take rows for {table}"):
            types = self._types.get(table)
            if types is None:  # else the client asks before each insert
                described = self._writer.query(f"DESCRIBE TABLE {table}").result_rows
                types = self._types[table] = {row[0]: row[1] for row in described}
            try:
                self._writer.insert(
                    table,
                    columns,
                    column_names=column_names,
                    column_type_names=[types[name] for name in column_names],
                    column_oriented=True,
                    settings=_insert_settings(token),
                )
            except (DataError, ValueError, TypeError, AttributeError) as error:  # raised by the client's serialisers
                raise RowsRefused(f"{table} can't hold a value: {_first_line(error)}") from error
            except DatabaseError as error:
                if is_bad_row(error):
                    raise RowsRefused(f"{table} refuses a row: {_first_line(error)}") from error
                raise

    def insert_avro(self, table: str, column_names: Sequence[str], data: bytes, token: str) -> None:
        """Inserts an Avro file. Raises `RowsRefused` if a row of it isn't what the file's header or the table says."""
        with self._errors(f"did not take rows for {table}"):
            try:
                self._writer.raw_insert(table, column_names, data, _insert_settings(token), fmt="Avro")
            except DatabaseError as error:
                if error.code == CANNOT_READ_ALL_DATA or is_bad_row(error):
                    raise RowsRefused(f"{table} refuses a row: {_first_line(error)}") from error
                raise

    def close(self) -> None:
        """Lets go of the store; an embedded one is then free for another process."""
        self._reader.close()
        self._writer.close()

    def _use_database(self) -> None:
        self._writer.database = self._reader.database = self._database

    def _apply(self, migration: Migration) -> None:
        for statement in migration.statements:
            self._writer.command(statement)
        row = [migration.version, migration.name, migration.checksum]
        self._writer.insert("migrations", [row], column_names=["version", "name", "checksum"])

    def _missing(self, migrations: Sequence[Migration]) -> list[Migration]:
        """Those still to be applied. Raises `StoreError` if the store has others than these, or newer ones."""
        known = {m.version: m for m in migrations}
        applied = self._writer.query("SELECT version, name, checksum FROM migrations ORDER BY version").result_rows
        for version, name, checksum in applied:
            if version not in known:
                raise StoreError(
                    f"database {self._database} in {self._where} has migration {version} ({name}), which this version "
                    "of Millstream doesn't know: upgrade it, or name another clickhouse_database"
                )
            if known[version].checksum != checksum:
                raise StoreError(
                    f"migration {version} ({name}) of database {self._database} in {self._where} was applied with "
                    "other contents than this version of Millstream has: use the version that made the store, or "
                    "name another clickhouse_database"
                )
        done = max((version for version, *_ in applied), default=0)
        return [m for m in migrations if m.version > done]

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except ClickHouseError as error:
            raise StoreError(f"store {self._where} {what}: {_first_line(error)}") from error


def _insert_settings(token: str) -> dict[str, Any]:
    return {
        "insert_deduplication_token": token,
        "async_insert": 0,  # else a server's profile could make it answer before the rows are stored
        # Ids with many different dates make a slow insert; that is no reason to refuse them for ever.
        "throw_on_max_partitions_per_insert_block": 0,
    }


def _connect(settings: Settings) -> Client:
    dsn = settings.clickhouse_dsn
    if dsn.startswith(EMBEDDED):
        return open_embedded(Path(dsn.removeprefix(EMBEDDED)))
    if not dsn.startswith(SERVER):
        raise ConfigError(
            f"setting clickhouse_dsn: {_without_password(dsn)!r} begins with neither {SERVER} nor {EMBEDDED}"
        )
    return clickhouse_connect.get_client(
        dsn=dsn,
        password=settings.clickhouse_password.get_secret_value(),
        secure=settings.clickhouse_secure,
        autogenerate_session_id=False,  # a session allows one query at a time
        pool_mgr=get_pool_manager(maxsize=settings.store_connection_pool),
    )


def open_embedded(folder: Path) -> Client:
    """Raises `StoreError` if another process has the folder, or it can't be made."""
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return clickhouse_connect.get_client(interface="chdb", path=str(folder))
    except OSError as error:
        raise StoreError(f"the embedded store's folder {folder} can't be made: {error.strerror}") from error
    except ClickHouseError as error:
        if "Error initializing EmbeddedServer" not in str(error):
            raise
        raise StoreError(
            f"the embedded store in {folder} is held by another process{_holder(folder)}: one at a time can. Ask again "
            f"when that has ended; or let `millstream store serve {folder}` have it, and name its address "
            "(MILLSTREAM_CLICKHOUSE_DSN=clickhouse://127.0.0.1:8123) to all others"
        ) from error


def _holder(folder: Path) -> str:
    """As the engine notes it down for people."""
    status = folder / "status"
    found = re.search(r"PID: (\d+)", status.read_text()) if status.is_file() else None
    return f" (pid {found[1]})" if found else ""


def _without_password(dsn: str) -> str:
    parts = urlsplit(dsn)
    return dsn if parts.password is None else dsn.replace(f":{parts.password}@", ":***@", 1)


def _first_line(error: Exception) -> str:
    """The message, without the version and stack that ClickHouse adds; of a failed connection what the network said."""
    if isinstance(cause := error.__cause__, HTTPError):
        said = str(getattr(cause, "reason", cause))
        return said.partition("): ")[2] or said  # behind the connection's own name
    return re.sub(r"\s*\(version [^)]*\)", "", str(error).strip().partition("\n")[0])
