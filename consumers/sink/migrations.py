"""The schema of the ClickHouse store: its numbered migrations, the lock around them, and how long tables keep rows."""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Final, get_args

from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError

from millstream.consumers.sink.clustered import LOCAL, clustered, on_cluster
from millstream.schemas.config.settings import RetentionTable

LOCK: Final = "migration_lock"
TABLE_EXISTS: Final = 57  # ClickHouse's error code

# The time that a table's retention counts from. Elsewhere it is the date within the rollout's id, by which the tables
# are partitioned: whole parts are dropped then, and nothing is rewritten.
RETENTION_TIMES: Final[dict[RetentionTable, str]] = {
    "training_steps": "ended_at",
    "workers": "last_seen",
    "dead_letters": "time",
}


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file of ``schemas/clickhouse/``; every statement in it may be run again."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def statements(self) -> list[str]:
        """A statement ends with a semicolon at the end of a line."""
        return [part.strip() for part in re.split(r";\s*$", self.sql, flags=re.MULTILINE) if part.strip()]

    def statements_for(self, cluster: str, database: str) -> list[str]:
        """For one server if ``cluster`` is empty."""
        if not cluster:
            return self.statements
        return [made for statement in self.statements for made in clustered(statement, cluster, database)]


def packaged_migrations() -> list[Migration]:
    """The migrations of this version of Millstream, in order."""
    found = sorted(
        (f for f in files("millstream.schemas").joinpath("clickhouse").iterdir() if f.name.endswith(".sql")),
        key=lambda f: f.name,
    )
    return [Migration(int(f.name[:4]), f.name.removesuffix(".sql"), f.read_text("utf-8")) for f in found]


@dataclass(frozen=True, slots=True)
class LockPolicy:
    # Then its holder counts as dead.
    stale_s: float = 60  # a migration takes milliseconds
    stale_on_cluster_s: float = 600  # there each statement may take a second
    poll_s: float = 0.1


@contextmanager
def locked(client: Client, policy: LockPolicy = LockPolicy(), cluster: str = "") -> Iterator[None]:
    """Lets one process at a time migrate the client's database.

    The lock is a table: creating one is atomic, and a server without Keeper has no other lock. The hosts of a cluster
    create their tables in the order of one queue, so of two processes the same one gets it on all hosts. The lock of a
    dead process is ignored, and dropped at the end. Several processes may do so at once: every statement may be run
    again.
    """
    stale_s = policy.stale_on_cluster_s if cluster else policy.stale_s
    while not _taken(client, cluster) and _age_s(client) <= stale_s:
        time.sleep(policy.poll_s)
    try:
        yield
    finally:
        client.command(f"DROP TABLE IF EXISTS {LOCK}{on_cluster(cluster)}")


def _taken(client: Client, cluster: str) -> bool:
    try:
        client.command(f"CREATE TABLE {LOCK}{on_cluster(cluster)} (held UInt8) ENGINE = Memory")
    except DatabaseError as error:
        if error.code != TABLE_EXISTS:
            raise
        return False
    return True


def _age_s(client: Client) -> int:
    """0 if the lock is free."""
    rows = client.query(
        "SELECT toInt64(now()) - toInt64(metadata_modification_time) FROM system.tables "
        "WHERE database = currentDatabase() AND name = {name:String}",
        parameters={"name": LOCK},
    ).result_rows
    return int(rows[0][0]) if rows else 0


def apply_retention(client: Client, days: Mapping[RetentionTable, int], cluster: str = "") -> None:
    """Sets how many days each table keeps its rows (absent: forever). ClickHouse deletes them in the background."""
    tables = client.query("SELECT name, engine_full FROM system.tables WHERE database = currentDatabase()").result_rows
    engines = {row[0]: row[1] for row in tables}
    for table in get_args(RetentionTable):
        name = f"{table}_raw{LOCAL if cluster else ''}"
        engine = engines.get(name)
        if engine is None:  # the store is older than the table
            continue
        found = re.search(r" TTL .*toIntervalDay\((\d+)\)", engine)
        wanted = days.get(table)
        if wanted == (int(found[1]) if found else None):
            continue
        change = "REMOVE TTL" if wanted is None else f"MODIFY TTL {_expiry(table, wanted)}"
        client.command(f"ALTER TABLE {name}{on_cluster(cluster)} {change}")


def _expiry(table: RetentionTable, days: int) -> str:
    if table in RETENTION_TIMES:
        return f"toDateTime({RETENTION_TIMES[table]}) + toIntervalDay({days})"
    date = "Date" if table == "spans" else "date"
    # Rows of an id without a date would expire at once: keep them.
    return f"if({date} = toDate(0), toDate(65535), {date} + toIntervalDay({days}))"
