"""The schema of the ClickHouse store: its numbered migrations, the lock around them, and how long tables keep rows."""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Final, get_args
from uuid import uuid4

from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError

from millstream.schemas.config.settings import RetentionTable
from millstream.schemas.errors import StoreError

LOCK: Final = "migration_lock"
TABLE_EXISTS, NO_SUCH_TABLE = 57, 60  # ClickHouse's error codes

# The time that a table's retention counts from. Elsewhere it is the date within the rollout's id, by which the tables
# are partitioned: whole parts are dropped then, and nothing is rewritten.
RETENTION_TIMES: Final[dict[RetentionTable, str]] = {"workers": "last_seen", "dead_letters": "time"}


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
    wait_s: float = 120.0  # longer than that, so that a stale lock can be taken over
    poll_s: float = 0.1


@contextmanager
def locked(client: Client, what: str, policy: LockPolicy = LockPolicy()) -> Iterator[None]:
    """Holds the migration lock of the client's database. Raises `StoreError` if the lock can't be had in time.

    The lock is a table: creating one is atomic, and a server without Keeper has no other lock. To take over a dead
    process's lock is to rename it to a name with the dead one's id: only one of those that wait can do so, and none can
    remove the lock that comes after.
    """
    mine = str(uuid4())
    waiting_until = time.monotonic() + policy.wait_s
    stale: list[str] = []
    while not _done(client, f"CREATE TABLE {LOCK} (held UInt8) ENGINE = Memory COMMENT '{mine}'", TABLE_EXISTS):
        for holder, age_s in _held(client):
            if age_s > policy.stale_s:
                name = f"`{LOCK}_{holder}`"
                if _done(client, f"RENAME TABLE {LOCK} TO {name}", TABLE_EXISTS, NO_SUCH_TABLE):
                    stale.append(name)
        if time.monotonic() > waiting_until:
            raise StoreError(
                f"other processes have been migrating database {what} for {policy.wait_s:g} s; if there are none, drop "
                f"its table {LOCK}"
            )
        time.sleep(policy.poll_s)
    try:
        yield
    finally:
        if mine in dict(_held(client)):  # else another process took the lock over
            client.command(f"DROP TABLE {LOCK}")
        for name in stale:
            client.command(f"DROP TABLE IF EXISTS {name}")


def _held(client: Client) -> list[tuple[str, int]]:
    """Holder and age in seconds; empty if the lock is free."""
    rows = client.query(
        "SELECT comment, toInt64(now()) - toInt64(metadata_modification_time) FROM system.tables "
        "WHERE database = currentDatabase() AND name = {name:String}",
        parameters={"name": LOCK},
    ).result_rows
    return [(holder, age_s) for holder, age_s in rows]


def _done(client: Client, statement: str, *lost: int) -> bool:
    """False if another process was faster, as the error codes ``lost`` say."""
    try:
        client.command(statement)
    except DatabaseError as error:
        if error.code not in lost:
            raise
        return False
    return True


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
