"""A store on a cluster, as far as the embedded engine is one. Its configuration names clusters whose hosts are the
engine itself, so Distributed tables reach its own tables. What it lacks is stood in for: ON CLUSTER is left out, and no
table is replicated, except with a Keeper, where they are created and stay empty.

    python on_a_cluster.py FOLDER data|no-macros|PORT-OF-A-KEEPER      writes JSON

A process of its own, since an engine has one configuration.
"""

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import clickhouse_connect
import factories
from clickhouse_connect.driver.client import Client
from sink_rig import publish, role, run_to_the_end

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink import clickhouse_writer
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.clustered import clustered
from millstream.consumers.sink.migrations import packaged_migrations
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import MillstreamError
from millstream.schemas.wire.records import DeadLetter, TrainingStep, Worker

HOST = "<replica><host>127.0.0.1</host><port>9000</port></replica>"
MACROS = "<macros><shard>1</shard><replica>a</replica></macros>"
CONFIGURATION = (
    "<clickhouse><tcp_port>9000</tcp_port>{macros}{keeper}<remote_servers>"
    f"<one><shard>{HOST}</shard></one><two><shard>{HOST}</shard><shard>{HOST}</shard></two>"
    "</remote_servers></clickhouse>"
)
KEEPER = "<zookeeper><node><host>127.0.0.1</host><port>{}</port></node></zookeeper>"
STATEMENTS = [statement for migration in packaged_migrations() for statement in migration.statements]
VIEW = "CREATE OR REPLACE VIEW"
SECOND_TABLE = f"""{VIEW} second_table AS
SELECT RolloutId FROM spans_raw WHERE RolloutId IN (SELECT rollout_id FROM triplets_raw)"""


def on_one_host(statement: str) -> str:
    return re.sub(r" ON CLUSTER '\w+'", "", statement)


def unreplicated(statement: str) -> str:
    plain = re.sub(
        r"Replicated(\w*MergeTree)\('[^']*', '[^']*'(?:, (\w+))?\)", lambda m: f"{m[1]}({m[2] or ''})", statement
    )
    return on_one_host(plain).replace("SETTINGS replicated_", "SETTINGS non_replicated_")


def statements_for(cluster: str, database: str) -> list[str]:
    return [made for each in packaged_migrations() for made in each.statements_for(cluster, database)]


class Engine:
    def __init__(self, folder: Path, macros: str = MACROS, keeper: str = "") -> None:
        self._path = f"{folder / 'store'}?config-file={folder / 'config.xml'}"
        (folder / "config.xml").write_text(CONFIGURATION.format(macros=macros, keeper=keeper))
        self._client = self.client()

    def client(self, *_: object, **__: object) -> Client:
        """As `connect` does, with the stand-ins."""
        client = clickhouse_connect.get_client(interface="chdb", path=self._path)
        command = client.command
        client.command = lambda sql, *args, **kw: command(unreplicated(sql), *args, **kw)  # type: ignore[method-assign]
        return client

    def writer(self, database: str, cluster: str = "") -> ClickHouseWriter:
        settings = load_settings(
            clickhouse_dsn="clickhouse://here", clickhouse_database=database, clickhouse_cluster=cluster or None
        )
        with patch.object(clickhouse_writer, "connect", self.client):
            return ClickHouseWriter(settings)

    def run(self, *statements: str, database: str) -> None:
        self._client.command(f"CREATE DATABASE IF NOT EXISTS {database}")
        self._client.database = database
        for statement in statements:
            self._client.command(statement)

    def rows(self, query: str) -> list[Any]:
        return list(self._client.query(query).result_rows)

    def column(self, query: str) -> list[Any]:
        return [row[0] for row in self.rows(query)]

    def views(self, database: str) -> list[str]:
        return self.column(
            f"SELECT name FROM system.tables WHERE database = '{database}' AND engine = 'View' ORDER BY name"
        )

    def all_rows(self, database: str) -> dict[str, list[str]]:
        """Of each view."""
        self._client.database = database
        return {view: sorted(map(repr, self.rows(f"SELECT * FROM {view}"))) for view in self.views(database)}

    def refused(self, database: str) -> dict[str, str]:
        """The views that can't be asked, and why."""
        self._client.database, found = database, {}
        for view in self.views(database):
            try:
                self.rows(f"SELECT * FROM {view} LIMIT 1")
            except Exception as error:
                found[view] = str(error)
        return found


def more_records(log: MemoryLog, settings: Settings) -> None:
    """What `publish` has not: steps, workers, dead letters, calls with tokens; and a span that is there twice."""
    topics, producer = settings.topics, log.producer()
    for n in range(12):
        step = TrainingStep(
            experiment_id=f"e{n % 2}",
            run="r",
            step=n // 2,
            model_version=f"r.0.{n}",
            started_at=1,
            ended_at=2 + n,
            trained=("a", "b"),
        )
        worker = Worker(worker_id=f"w{n % 5}", role="runner", host="h", version="1", started=1, last_seen=2 + n)
        letter = DeadLetter(
            topic=topics.events,
            partition=0,
            offset=n,
            value=b"x",
            timestamp=1,
            role="sink",
            reason="broken",
            error="no",
            time=1 + n,
        )
        task = factories.task()
        call = factories.call(task, "a", str(n), sequence=n)
        sent: list[tuple[str, Any, str]] = [
            (topics.training, step, step.experiment_id),
            (topics.workers, worker, worker.worker_id),
            (topics.dead, letter, "k"),
            (topics.events, call, task.rollout_id),
            (topics.events, call, task.rollout_id),
        ]
        for topic, record, key in sent:
            producer.send(topic, record, key=key)
    producer.close(20.0)


async def stored(engine: Engine) -> None:
    """The same records through a sink of one server and through one of a cluster, and then once more."""
    plain, spread = engine.writer("plain"), engine.writer("spread", "one")
    for writer in (plain, spread):
        writer.migrate()
    settings = load_settings(kafka_partitions=2, retention_days={"spans": 9000})
    log = MemoryLog(settings.topics, encode=True)
    publish(log, settings, 24)
    more_records(log, settings)
    for name in ("first", "again"):
        await run_to_the_end(
            *(role(log, writer, settings, name=f"{name}-{i}") for i, writer in enumerate((plain, spread)))
        )
    kept = load_settings(
        clickhouse_dsn="clickhouse://here",
        clickhouse_database="spread",
        clickhouse_cluster="one",
        retention_days={"spans": 9000},
    )
    with patch.object(clickhouse_writer, "connect", engine.client):
        ClickHouseWriter(kept).migrate()  # nothing is missing; sets the retention


def sharded(engine: Engine, database: str, keys: dict[str, str]) -> None:
    """The tables of `plain`, their rows on two shards by their keys, each twice; views over both."""
    for shard in (0, 1):
        engine.run(
            *(
                statement
                for table, key in keys.items()
                for statement in (
                    f"CREATE TABLE {table} AS plain.{table}",
                    *[f"INSERT INTO {table} SELECT * FROM plain.{table} WHERE {key.format(shard=shard)} % 2 = {shard}"]
                    * 2,
                )
            ),
            database=f"{database}{shard}",
        )
    both = f"REGEXP('^{database}[01]$')"
    engine.run(
        *(f"CREATE TABLE {table} AS plain.{table} ENGINE = Merge({both}, '^{table}$')" for table in keys),
        database=database,
    )
    engine.run(*(statement for statement in STATEMENTS if VIEW in statement), database=database)


def refusals(engine: Engine, cases: list[tuple[str, str, str]]) -> dict[str, str]:
    """Of (case, database, cluster)."""
    found = {}
    for name, database, cluster in cases:
        try:
            engine.writer(database, cluster).migrate()
        except MillstreamError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def data(engine: Engine) -> dict[str, Any]:
    asyncio.run(stored(engine))
    distributed = [
        found
        for each in statements_for("one", "d")
        if (found := re.search(r"EXISTS (\w+) .*Distributed\(.*, (cityHash64\(.*\))\)", each))
    ]
    keys = {found[1]: found[2] for found in distributed}
    sharded(engine, "sharded", keys)
    sharded(engine, "scattered", keys | {"spans_raw": "{shard}"})  # the control: a span is on both
    local = re.compile(r"(?:,|\nSETTINGS) distributed_product_mode = 'local'")
    all_of_two = [*statements_for("two", "twice"), *clustered(SECOND_TABLE, "two", "twice")]
    twice = [unreplicated(each) for each in all_of_two]
    engine.run(*twice, database="twice")
    allowed = engine.refused("twice")
    engine.run(*(local.sub("", each) for each in twice if VIEW in each), database="twice")
    parsed = [re.sub(r"^--.*\n", "", each, flags=re.MULTILINE) for each in statements_for("one", "d")]
    return {
        "rows": {name: engine.all_rows(name) for name in ("plain", "spread", "sharded", "scattered")},
        "engines": engine.rows(
            "SELECT engine, toUInt32(count()) FROM system.tables WHERE database = 'spread' GROUP BY engine"
        ),
        "ttl": engine.column(
            "SELECT engine_full FROM system.tables WHERE database = 'spread' AND name = 'spans_raw_local'"
        ),
        "shards": engine.column(
            "SELECT toUInt32(uniqExact(RolloutId)) FROM merge(REGEXP('sharded[01]'), 'spans_raw') GROUP BY _database"
        ),
        "refused": {"local": allowed, "deny": engine.refused("twice")},
        "parsed": len([engine.rows(f"EXPLAIN AST {each}") for each in parsed]),
        "errors": refusals(
            engine,
            [("unknown cluster", "new", "three"), ("of one server", "plain", "one"), ("of a cluster", "spread", "")],
        ),
    }


def main(folder: Path, what: str) -> dict[str, Any]:
    if what == "data":
        return data(Engine(folder))
    if what == "no-macros":
        return {"errors": refusals(Engine(folder, macros=""), [("no macros", "new", "one")])}
    engine = Engine(folder, keeper=KEEPER.format(what))
    client = clickhouse_connect.get_client(interface="chdb", path=engine._path)
    client.command("CREATE DATABASE made")
    client.database = "made"
    for statement in statements_for("one", "made"):
        # The first waits for a replica that can be reached, the second needs its column.
        if not re.search(r"^(ALTER TABLE \w+_local|INSERT)", statement, re.MULTILINE):
            client.command(on_one_host(statement))
    query = "SELECT engine, toUInt32(count()) FROM system.tables WHERE database = 'made' GROUP BY engine"
    paths = "SELECT zookeeper_path FROM system.replicas WHERE database = 'made'"
    return {"engines": engine.rows(query), "paths": engine.column(paths)}


if __name__ == "__main__":
    answer = main(Path(sys.argv[1]), sys.argv[2])
    print(json.dumps(answer, default=str))
    sys.stdout.flush()
    os._exit(0)  # an engine with a configuration of its own takes its time to end
