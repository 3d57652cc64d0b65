"""The schema of the store on a cluster, made of the packaged one: each table is a replicated one on every shard, named
``…_local``, behind a Distributed table of the old name; views read those. Pure.

A rollout's rows lie on one shard, so what a view does by rollout, and what replaces twins, needs no other shard.
"""

import re
from collections.abc import Mapping
from typing import Final

LOCAL: Final = "_local"
PATH: Final = "/clickhouse/tables"  # in Keeper
# An answer to the sink means: on most replicas of the rows' shard. Otherwise a Distributed table answers when the rows
# lie in a queue on one machine, and offsets would be committed for what the loss of its disk takes away.
INSERT_SETTINGS: Final[dict[str, int | str]] = {
    "distributed_foreground_insert": 1,
    "insert_quorum": "auto",
    "insert_quorum_timeout": 60_000,  # ms; less than the client waits, so that the error says what is missing
}
# A table within IN or JOIN is that of the same shard, where the rollout's rows are.
LOOK_HERE: Final[dict[str, int | str]] = {"distributed_product_mode": "local"}

_TABLE = re.compile(r"^CREATE TABLE IF NOT EXISTS (\w+) \(", re.MULTILINE)
_ENGINE = re.compile(r"^\) ENGINE = (\w+)(?:\((\w+)\))?", re.MULTILINE)
_ORDER = re.compile(r"^ORDER BY \(?([^()\n]+)\)?$", re.MULTILINE)
_WRITER = re.compile(r"^CREATE MATERIALIZED VIEW IF NOT EXISTS \w+(?= TO )", re.MULTILINE)
_VIEW = re.compile(r"^CREATE OR REPLACE VIEW \w+(?= AS$)", re.MULTILINE)
_COLUMN = re.compile(r"^ALTER TABLE (\w+)(?=\s+(?:ADD|DROP|MODIFY|RENAME) COLUMN )", re.MULTILINE)
_INSERT = re.compile(r"^INSERT INTO \w+$", re.MULTILINE)
_SETTINGS = re.compile(r"^SETTINGS [^()]*\Z", re.MULTILINE)


def on_cluster(cluster: str) -> str:
    """What a statement about tables says behind their name; nothing without a cluster."""
    return f" ON CLUSTER '{cluster}'" if cluster else ""


def replicated(path: str, replica: str = "{replica}", version: str | None = None, kind: str = "Replacing") -> str:
    """The engine of a replicated table. ClickHouse puts its macros in place of ``{shard}`` and ``{replica}``."""
    arguments = ", ".join([f"'{PATH}/{path}', '{replica}'", *([version] if version else [])])
    return f"Replicated{kind}MergeTree({arguments})"


def clustered(statement: str, cluster: str, database: str) -> list[str]:
    """The statements for a cluster. Raises `ValueError` for a kind that no released migration has."""
    if (table := _TABLE.search(statement)) is not None:
        return _tables(statement, table, cluster, database)
    if (alter := _COLUMN.search(statement)) is not None:
        return [_inserted(statement, alter.end(), f"{part}{on_cluster(cluster)}") for part in (LOCAL, "")]
    if _INSERT.search(statement) is not None:  # by one host, through Distributed tables
        return [_with_settings(statement, LOOK_HERE | INSERT_SETTINGS)]
    if (writer := _WRITER.search(statement)) is not None:
        return [_inserted(statement, writer.end(), on_cluster(cluster))]
    if (view := _VIEW.search(statement)) is not None:
        return [_inserted(_with_settings(statement, LOOK_HERE), view.end(), on_cluster(cluster))]
    raise ValueError(f"it is not known how this is done on a cluster: {statement}")


def _tables(statement: str, table: re.Match[str], cluster: str, database: str) -> list[str]:
    name, engine = table[1], _ENGINE.search(statement)
    if engine is None or engine[1] not in ("ReplacingMergeTree", "Null"):
        raise ValueError(f"it is not known how this table is kept on a cluster: {statement}")
    if engine[1] == "Null":
        return [_inserted(statement, table.end(1), on_cluster(cluster))]
    order = _ORDER.search(statement)
    assert order is not None, statement
    columns = [column.strip() for column in order[1].split(",")]
    key = columns[0] if columns[0] in ("rollout_id", "RolloutId") else ", ".join(columns)
    kept = replicated(f"{{shard}}/{database}/{name}", version=engine[2])
    local = statement[: engine.start()] + f") ENGINE = {kept}" + statement[engine.end() :]
    local = _inserted(local, table.end(1), f"{LOCAL}{on_cluster(cluster)}")
    return [
        local.replace("non_replicated_deduplication_window", "replicated_deduplication_window"),
        f"CREATE TABLE IF NOT EXISTS {name}{on_cluster(cluster)} AS {name}{LOCAL} "
        f"ENGINE = Distributed('{cluster}', '{database}', '{name}{LOCAL}', cityHash64({key}))",
    ]


def _inserted(text: str, place: int, part: str) -> str:
    return text[:place] + part + text[place:]


def _with_settings(query: str, settings: Mapping[str, int | str]) -> str:
    """A query with further settings at its end."""
    more = ", ".join(f"{name} = {value!r}" for name, value in settings.items())
    return f"{query}, {more}" if _SETTINGS.search(query) else f"{query}\nSETTINGS {more}"
