"""The store's schema over time: numbered files, a lock for whoever applies them, and how long tables keep rows."""

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
LOCK_STALE_S = 60  # then its holder is taken for dead: what a migration does takes milliseconds
LOCK_WAIT_S = 120.0
LOCK_POLL_S = 0.1
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
    """Those that this version of Millstream brings, in order."""
    found = sorted(
        (f for f in files("millstream.schemas").joinpath("clickhouse").iterdir() if f.name.endswith(".sql")),
        key=lambda f: f.name,
    )
    return [Migration(int(f.name[:4]), f.name.removesuffix(".sql"), f.read_text("utf-8")) for f in found]


@contextmanager
def locked(client: Client, what: str) -> Iterator[None]:
    """Only one process at a time is in here, for the client's database. Raises `StoreError` if that takes too long.

    The lock is a table: creating one is atomic, and a server without Keeper has no other lock. One that a dead process
    left behind is renamed to a name made of its own id: of all that wait only one succeeds in that, and none takes away
    the lock that follows.
    """
    mine = str(uuid4())
    waiting_until = time.monotonic() + LOCK_WAIT_S
    stale: list[str] = []
    while not _done(client, f"CREATE TABLE {LOCK} (held UInt8) ENGINE = Memory COMMENT '{mine}'", TABLE_EXISTS):
        for holder, age_s in _held(client):
            if age_s > LOCK_STALE_S:
                name = f"`{LOCK}_{holder}`"
                if _done(client, f"RENAME TABLE {LOCK} TO {name}", TABLE_EXISTS, NO_SUCH_TABLE):
                    stale.append(name)
        if time.monotonic() > waiting_until:
            raise StoreError(
                f"database {what} has been under migration by other processes for {LOCK_WAIT_S:g} s; if there are "
                f"none, drop its table {LOCK}"
            )
        time.sleep(LOCK_POLL_S)
    try:
        yield
    finally:
        if mine in dict(_held(client)):  # else we were taken for dead
            client.command(f"DROP TABLE {LOCK}")
        for name in stale:
            client.command(f"DROP TABLE IF EXISTS {name}")


def _held(client: Client) -> list[tuple[str, int]]:
    """Holder and age in seconds; nothing if nobody has the lock."""
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
    """Lets each table keep its rows for so many days, or for ever. ClickHouse deletes in the background."""
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
    # The rows of an id without a date would be gone at once: they stay.
    return f"if({date} = toDate(0), toDate(65535), {date} + toIntervalDay({days}))"
