"""Writes to ClickHouse: brings the tables up to date and inserts rows."""

from collections.abc import Sequence
from typing import Any, Final

from clickhouse_connect.driver.exceptions import DatabaseError, DataError

from millstream.consumers.sink.bad_rows import is_bad_row
from millstream.consumers.sink.clickhouse_connection import address, connect, first_line, store_errors
from millstream.consumers.sink.clustered import INSERT_SETTINGS, on_cluster, replicated
from millstream.consumers.sink.migrations import Migration, apply_retention, locked, packaged_migrations
from millstream.consumers.sink.rows import RowsRefused
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.spans.text import valid

CANNOT_READ_ALL_DATA: Final = 33  # ClickHouse's error code; for a complete Avro file: one of its rows is truncated


class ClickHouseWriter:
    """An `Inserter`: one process's connection for writing. Any thread may call it; calls wait for each other.

    Raises `StoreError` if the server does not answer, or if another process holds the folder of an embedded store.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = settings.clickhouse_database
        self._cluster = settings.clickhouse_cluster
        self._types: dict[str, dict[str, str]] = {}
        self.client = connect(settings)
        with store_errors(settings, "can't be opened"):
            known = self.client.query("SELECT name FROM system.databases").result_columns
        if self._database in known[0]:
            self.client.database = self._database

    def migrate(self, migrations: Sequence[Migration] | None = None) -> list[str]:
        """Brings the tables, views and retention up to date; returns the names of the migrations that it applied.

        Raises `StoreError` if the store has migrations that this version of Millstream doesn't know, or other contents
        of one, or if it was created with another ``clickhouse_cluster``; `ConfigError` if there is no such cluster.
        """
        migrations = packaged_migrations() if migrations is None else migrations
        with store_errors(self._settings, "can't be migrated"):
            self._create_database()
            applied = []
            if self._missing(migrations):
                with locked(self.client, cluster=self._cluster):
                    applied = self._missing(migrations)  # another process may have been faster
                    for migration in applied:
                        self._apply(migration)
            self._types.clear()
            apply_retention(self.client, self._settings.retention_days, self._cluster)
        return [m.name for m in applied]

    def insert(self, table: str, column_names: Sequence[str], columns: Sequence[Sequence[Any]], token: str) -> None:
        """Inserts columns of equal length in one block. ClickHouse drops a block whose token it has seen before,
        whatever its rows are.

        Raises `RowsRefused` if the table can't hold one of the rows.
        """
        with store_errors(self._settings, f"did not take rows for {table}"):
            types = self._types.get(table)
            if types is None:  # else the client asks before each insert
                described = self.client.query(f"DESCRIBE TABLE {table}").result_rows
                types = self._types[table] = {row[0]: row[1] for row in described}

            def insert(columns: Sequence[Sequence[Any]]) -> None:
                self.client.insert(
                    table,
                    columns,
                    column_names=column_names,
                    column_type_names=[types[name] for name in column_names],
                    column_oriented=True,
                    settings=self._insert_settings(token),
                )

            try:
                try:
                    insert(columns)
                except UnicodeEncodeError:  # records of a log in memory that were never encoded
                    insert(valid(columns))
            except (DataError, ValueError, TypeError, AttributeError) as error:  # raised by the client's serialisers
                raise RowsRefused(f"{table} can't hold a value: {first_line(error)}") from error
            except DatabaseError as error:
                if is_bad_row(error):
                    raise RowsRefused(f"{table} refuses a row: {first_line(error)}") from error
                raise

    def insert_avro(self, table: str, column_names: Sequence[str], data: bytes, token: str) -> None:
        """Inserts an Avro file. Raises `RowsRefused` if a row doesn't match the file's schema or the table."""
        with store_errors(self._settings, f"did not take rows for {table}"):
            try:
                self.client.raw_insert(table, column_names, data, self._insert_settings(token), fmt="Avro")
            except DatabaseError as error:
                if error.code == CANNOT_READ_ALL_DATA or is_bad_row(error):
                    raise RowsRefused(f"{table} refuses a row: {first_line(error)}") from error
                raise

    def _insert_settings(self, token: str) -> dict[str, Any]:
        return {
            "insert_deduplication_token": token,
            "async_insert": 0,  # else a server's profile could make it answer before the rows are stored
            # Ids with many different dates make an insert slow, but must not make it fail forever.
            "throw_on_max_partitions_per_insert_block": 0,
            **(INSERT_SETTINGS if self._cluster else {}),
        }

    def close(self) -> None:
        """Closes the connection. Another process can open an embedded store after its last connection is closed."""
        self.client.close()

    def _create_database(self) -> None:
        """And the table of migrations. On a cluster only if this host has none: hosts that are down would be waited
        for."""
        if self._cluster:
            self._check_cluster()
        query = "SELECT name, engine FROM system.tables WHERE database = {database:String}"
        asked = self.client.query(query, parameters={"database": self._database})
        tables: dict[str, str] = {row[0]: row[1] for row in asked.result_rows}
        spread = tables.get("tasks_raw") == "Distributed"
        if "tasks_raw" in tables and spread != bool(self._cluster):
            raise StoreError(
                f"database {self._database} in {address(self._settings)} was created "
                f"{'on a cluster' if spread else 'without a cluster'}: {'set' if spread else 'leave out'} "
                "clickhouse_cluster, or name another clickhouse_database"
            )
        if not ("migrations" in tables and self._cluster):
            self.client.command(f"CREATE DATABASE IF NOT EXISTS {self._database}{on_cluster(self._cluster)}")
        self.client.database = self._database
        if "migrations" not in tables:
            # Every host of a cluster has all rows.
            path = f"all/{self._database}/migrations"
            engine = replicated(path, "{shard}-{replica}", kind="") if self._cluster else "MergeTree"
            self.client.command(
                f"CREATE TABLE IF NOT EXISTS migrations{on_cluster(self._cluster)} (version UInt32, name String, "
                f"checksum String, applied_at DateTime64(3, 'UTC') DEFAULT now64(3)) ENGINE = {engine} ORDER BY version"
            )

    def _check_cluster(self) -> None:
        where = f"setting clickhouse_cluster: {address(self._settings)}"
        clusters = sorted({name for (name,) in self.client.query("SELECT cluster FROM system.clusters").result_rows})
        if self._cluster not in clusters:
            raise ConfigError(f"{where} knows no cluster {self._cluster!r}, but {', '.join(clusters) or 'none'}")
        macros = {name for (name,) in self.client.query("SELECT macro FROM system.macros").result_rows}
        if missing := {"shard", "replica"} - macros:
            raise ConfigError(
                f"{where} has no macro {' and '.join(sorted(missing))}, by which replicated tables find each other: "
                "define them in its configuration"
            )

    def _apply(self, migration: Migration) -> None:
        for statement in migration.statements_for(self._cluster, self._database):
            self.client.command(statement)
        row = [migration.version, migration.name, migration.checksum]
        self.client.insert("migrations", [row], column_names=["version", "name", "checksum"])

    def _missing(self, migrations: Sequence[Migration]) -> list[Migration]:
        """The migrations that are still to be applied. Raises `StoreError` if the store has others, or newer ones."""
        known = {m.version: m for m in migrations}
        where = f"database {self._database} in {address(self._settings)}"
        applied = self.client.query("SELECT version, name, checksum FROM migrations ORDER BY version").result_rows
        for version, name, checksum in applied:
            if version not in known:
                raise StoreError(
                    f"{where} has migration {version} ({name}), which this version of Millstream doesn't know: upgrade "
                    "it, or name another clickhouse_database"
                )
            if known[version].checksum != checksum:
                raise StoreError(
                    f"migration {version} ({name}) of {where} was applied with other contents than this version of "
                    "Millstream has: use the version that created the store, or name another clickhouse_database"
                )
        done = max((version for version, *_ in applied), default=0)
        return [m for m in migrations if m.version > done]
