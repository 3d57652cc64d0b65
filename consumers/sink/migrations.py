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


def packaged_migrations() -> list[Migration]:
    """The migrations of this version of Millstream, in order."""
    found = sorted(
        (f for f in files("millstream.schemas").joinpath("clickhouse").iterdir() if f.name.endswith(".sql")),
        key=lambda f: f.name,
    )
    return [Migration(int(f.name[:4]), f.name.removesuffix(".sql"), f.read_text("utf-8")) for f in found]


@dataclass(frozen=True, slots=True)
class LockPolicy:
    stale_s: float = 60  # then its holder counts as dead: a migration takes milliseconds
    poll_s: float = 0.1


@contextmanager
def locked(client: Client, policy: LockPolicy = LockPolicy()) -> Iterator[None]:
    """Lets one process at a time migrate the client's database.

    The lock is a table: creating one is atomic, and a server without Keeper has no other lock. That of a dead process
    is ignored, and dropped at the end. Several processes may do so at once: every statement may be run again.
    """
    while not _taken(client) and _age_s(client) <= policy.stale_s:
        time.sleep(policy.poll_s)
    try:
        yield
    finally:
        client.command(f"DROP TABLE IF EXISTS {LOCK}")


def _taken(client: Client) -> bool:
    try:
        client.command(f"CREATE TABLE {LOCK} (held UInt8) ENGINE = Memory")
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


def apply_retention(client: Client, days: Mapping[RetentionTable, int]) -> None:
    """Sets how many days each table keeps its rows (absent: forever). ClickHouse deletes them in the background."""
    tables = client.query("SELECT name, engine_full FROM system.tables WHERE database = currentDatabase()").result_rows
    engines = {row[0]: row[1] for row in tables}
    for table in get_args(RetentionTable):
        engine = engines.get(f"{table}_raw")
        if engine is None:  # the store is older than the table
            continue
        found = re.search(r" TTL .*toIntervalDay\((\d+)\)", engine)
        wanted = days.get(table)
        if wanted == (int(found[1]) if found else None):
            continue
        change = "REMOVE TTL" if wanted is None else f"MODIFY TTL {_expiry(table, wanted)}"
        client.command(f"ALTER TABLE {table}_raw {change}")


def _expiry(table: RetentionTable, days: int) -> str:
    if table in RETENTION_TIMES:
        return f"toDateTime({RETENTION_TIMES[table]}) + toIntervalDay({days})"
    date = "Date" if table == "spans" else "date"
    # Rows of an id without a date would expire at once: keep them.
    return f"if({date} = toDate(0), toDate(65535), {date} + toIntervalDay({days}))"
