"""The store on a cluster: the packaged schema as replicated and Distributed tables, which hold and answer the same."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millstream.consumers.sink.clustered import INSERT_SETTINGS, clustered
from millstream.consumers.sink.migrations import packaged_migrations
from millstream.pipeline.addresses import LOOPBACK, free_port
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError

ROOT = Path(__file__).parents[3]
STATEMENTS = [
    statement for migration in packaged_migrations() for statement in migration.statements_for("main", "millstream")
]
RAW = [name for each in STATEMENTS if (name := re.search(r"EXISTS (\w+_raw) ON CLUSTER 'main' AS", each))]
# ZooKeeper does not ask for what it needs at run time.
ZOOKEEPER = (
    ("org.apache.zookeeper", "zookeeper", "3.9.4"),
    ("org.xerial.snappy", "snappy-java", "1.1.10.7"),
    ("io.dropwizard.metrics", "metrics-core", "4.2.30"),
    ("commons-cli", "commons-cli", "1.9.0"),
)
ZOOKEEPER_START_S = 120.0  # on a busy machine


def test_every_statement_is_for_the_whole_cluster() -> None:
    for statement in STATEMENTS:
        inserts = "\nINSERT INTO " in f"\n{statement}"
        assert statement.count(" ON CLUSTER 'main'") == (not inserts), statement


def test_each_table_is_replicated_on_its_shard_and_distributed_by_rollout() -> None:
    packaged = {
        name[1]
        for migration in packaged_migrations()
        for each in migration.statements
        if (name := re.search(r"CREATE TABLE IF NOT EXISTS (\w+_raw)", each))
    }
    assert {match[1] for match in RAW} == packaged
    keys = {
        found[1]: found[2]
        for each in STATEMENTS
        if (found := re.search(r"Distributed\('main', 'millstream', '(\w+)_local', cityHash64\((.*)\)\)$", each))
    }
    by_rollout = dict.fromkeys(packaged, "rollout_id") | {"spans_raw": "RolloutId"}
    assert keys == by_rollout | {
        "controls_raw": "kind, name",
        "workers_raw": "worker_id",
        "dead_letters_raw": "source_topic, source_partition, source_offset, role, reason",
        "training_steps_raw": "experiment_id, epoch, step",
    }
    for table in packaged:
        (local,) = [each for each in STATEMENTS if f"EXISTS {table}_local ON CLUSTER 'main' (" in each]
        path = f"ReplicatedReplacingMergeTree('/clickhouse/tables/{{shard}}/millstream/{table}', '{{replica}}'"
        assert path in local
        assert "SETTINGS replicated_deduplication_window = 1000" in local


def test_the_column_that_decides_among_twins_is_kept() -> None:
    (tasks,) = [each for each in STATEMENTS if "EXISTS tasks_raw_local" in each]
    assert "'{replica}', claimed)\nPARTITION BY date\nORDER BY (rollout_id, attempt)" in tasks


def test_a_new_column_is_added_to_both_tables() -> None:
    for change in (" ADD COLUMN IF NOT EXISTS a Int8", "\n    ADD COLUMN a Int8,\n    ADD COLUMN b Int8"):
        assert clustered(f"-- Why.\nALTER TABLE spans_raw{change}", "main", "millstream") == [
            f"-- Why.\nALTER TABLE spans_raw_local ON CLUSTER 'main'{change}",
            f"-- Why.\nALTER TABLE spans_raw ON CLUSTER 'main'{change}",
        ]


def test_rows_are_inserted_by_one_host_which_waits_for_the_shards() -> None:
    (made,) = clustered("INSERT INTO spans_raw\nSELECT * FROM spans_raw\nSETTINGS a = 1", "main", "millstream")
    assert made.startswith("INSERT INTO spans_raw\nSELECT * FROM spans_raw\nSETTINGS a = 1, ")
    for setting in (
        "distributed_product_mode = 'local'",
        "distributed_foreground_insert = 1",
        "insert_quorum = 'auto'",
    ):
        assert setting in made


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE IF NOT EXISTS a (\n    b Int8\n) ENGINE = Log",
        "CREATE TABLE IF NOT EXISTS a (\n    b Int8\n) ENGINE = AggregatingMergeTree\nORDER BY b",
        "ALTER TABLE spans_raw ADD INDEX a b TYPE minmax",
        "OPTIMIZE TABLE spans_raw",
        "DROP TABLE spans_raw",
    ],
)
def test_a_statement_whose_meaning_on_a_cluster_is_not_known_is_refused(statement: str) -> None:
    with pytest.raises(ValueError, match="on a cluster"):
        clustered(statement, "main", "millstream")


def test_an_embedded_store_has_no_cluster() -> None:
    with pytest.raises(ConfigError, match=r"clickhouse_cluster.*an embedded store has no cluster: set clickhouse_dsn"):
        load_settings(clickhouse_cluster="main", clickhouse_dsn="chdb://store")
    with pytest.raises(ConfigError, match="clickhouse_cluster"):
        load_settings(clickhouse_cluster="a' b", clickhouse_dsn="clickhouse://host")


def test_inserts_on_a_cluster_wait_for_the_shard_and_most_of_its_replicas() -> None:
    assert INSERT_SETTINGS["distributed_foreground_insert"] == 1
    assert INSERT_SETTINGS["insert_quorum"] == "auto"


def on_a_cluster(folder: Path, what: str) -> dict[str, Any]:
    script = Path(__file__).with_name("on_a_cluster.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, script, folder, what], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_a_cluster(tmp_path_factory.mktemp("cluster"), "data")


@pytest.mark.slow
def test_a_sink_writes_a_cluster_s_tables_and_every_view_has_the_same_rows(cluster: dict[str, Any]) -> None:
    """Through Distributed tables with one shard, what came again included."""
    plain = cluster["rows"]["plain"]
    assert len(plain) > 20
    assert len(plain["rollouts"]) == 24
    assert cluster["rows"]["spread"] == plain
    engines = dict(cluster["engines"])
    assert (engines["Distributed"], engines["ReplacingMergeTree"]) == (len(RAW), len(RAW))
    assert "toIntervalDay(9000)" in cluster["ttl"][0]


@pytest.mark.slow
def test_every_view_over_two_shards_has_the_rows_of_that_over_one(cluster: dict[str, Any]) -> None:
    """Rows are routed by the keys of the Distributed tables, and each is there twice. The control: spans that lie on
    both shards are counted twice."""
    rows = cluster["rows"]
    assert len(cluster["shards"]) == 2
    assert min(cluster["shards"]) > 0
    assert rows["sharded"] == rows["plain"]
    wrong = {view for view in rows["plain"] if rows["scattered"][view] != rows["plain"][view]}
    assert {"spans", "rewards", "tokens_per_minute"} <= wrong


@pytest.mark.slow
def test_views_that_look_into_a_second_table_are_permitted_with_several_shards(cluster: dict[str, Any]) -> None:
    """The control: without the views' own setting ClickHouse refuses such a view."""
    assert cluster["refused"]["local"] == {}
    assert "Double-distributed IN/JOIN" in cluster["refused"]["deny"]["second_table"]
    assert cluster["parsed"] == len(STATEMENTS)  # ClickHouse's parser takes them as they are


@pytest.mark.slow
def test_wrong_clusters_are_refused_with_what_to_do(cluster: dict[str, Any], tmp_path: Path) -> None:
    errors = cluster["errors"] | on_a_cluster(tmp_path, "no-macros")["errors"]
    other = "or name another clickhouse_database"
    assert {case: error.partition("here ")[2] for case, error in errors.items()} == {
        "unknown cluster": "knows no cluster 'three', but one, two",
        "of one server": f"was created without a cluster: leave out clickhouse_cluster, {other}",
        "of a cluster": f"was created on a cluster: set clickhouse_cluster, {other}",
        "no macros": "has no macro replica and shard, by which replicated tables find each other: define them in its "
        "configuration",
    }


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[int]:
    """The port of a ZooKeeper."""
    maven, java = shutil.which("mvn"), shutil.which("java")
    if maven is None or java is None:
        pytest.skip("no mvn and java on PATH: they fetch and run ZooKeeper")
    needed = "".join(
        f"<dependency><groupId>{group}</groupId><artifactId>{name}</artifactId><version>{version}</version></dependency>"
        for group, name, version in ZOOKEEPER
    )
    (tmp_path / "pom.xml").write_text(
        "<project xmlns='http://maven.apache.org/POM/4.0.0'><modelVersion>4.0.0</modelVersion><groupId>millstream</groupId>"
        f"<artifactId>keeper</artifactId><version>1</version><packaging>pom</packaging><dependencies>{needed}</dependencies></project>"
    )
    copied = [maven, "-B", "-q", "dependency:copy-dependencies", f"-DoutputDirectory={tmp_path / 'jars'}"]
    subprocess.run(copied, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
    port = free_port()
    command = [java, "-Xmx128m", "-Dzookeeper.admin.enableServer=false", f"-Dzookeeper.clientPortAddress={LOOPBACK}"]
    command += ["-cp", str(tmp_path / "jars" / "*"), "org.apache.zookeeper.server.ZooKeeperServerMain"]
    with (tmp_path / "keeper.log").open("wb") as log:
        process = subprocess.Popen([*command, str(port), str(tmp_path / "data")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + ZOOKEEPER_START_S
        while True:
            try:
                socket.create_connection((LOOPBACK, port), 1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "keeper.log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_the_tables_are_created_with_a_real_keeper(keeper: int, tmp_path: Path) -> None:
    made = on_a_cluster(tmp_path, str(keeper))
    engines = dict(made["engines"])
    assert (engines["ReplicatedReplacingMergeTree"], engines["Distributed"]) == (len(RAW), len(RAW))
    assert (engines["MaterializedView"], engines["Null"]) == (2, 1)
    assert engines["View"] > 20
    assert sorted(made["paths"]) == sorted(f"/clickhouse/tables/1/made/{match[1]}" for match in RAW)
