"""The dashboards: their files are current, and every query names what exists."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from exposition import labels_of, series

from millstream.deploy.grafana.make import DASHBOARDS, FOLDER, files
from millstream.deploy.grafana.panels import WIDTH
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.schemas.config.settings import Settings, load_settings

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
TSC = ROOT / ".npm-ops" / "node_modules" / ".bin" / "tsc"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]


def targets(language: str) -> list[Any]:
    """The queries of all panels."""
    return [
        pytest.param(target, id=f"{board['uid']}: {panel['title']} {target['refId']}")
        for board in DASHBOARDS
        for panel in board["panels"]
        for target in panel.get("targets", ())
        if language in target
    ]


def filled_in(sql: str, experiments: str, since: int, until: int) -> str:
    """SQL as Grafana's data source sends it."""
    sql = sql.replace("${experiment:singlequote}", experiments)
    return re.sub(r"\$__timeFilter\((\w+)\)", rf"\1 >= toDateTime({since}) AND \1 <= toDateTime({until})", sql)


@pytest.fixture
def settings(folder: Path) -> Settings:
    return load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database="dashboards")


def test_the_files_are_those_that_make_writes() -> None:
    """Run `python -m millstream.deploy.grafana.make` if this fails."""
    assert {path: path.read_text() for path in FOLDER.glob("*.json")} == files()


@pytest.mark.parametrize("target", targets("expr"))
def test_a_query_of_prometheus_names_metrics_and_labels_that_exist(target: dict[str, Any]) -> None:
    labels = labels_of(target["expr"], series(RULES))
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels


@pytest.mark.parametrize("target", targets("rawSql"))
def test_a_query_of_the_store_runs(target: dict[str, Any], store: ClickHouseStore) -> None:
    assert store.sql(filled_in(target["rawSql"], "'a', 'b'", 0, 2_000_000_000)).rows == []


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board["uid"])
def test_panels_have_numbers_of_their_own_and_do_not_overlap(board: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < WIDTH
        assert not taken & cells
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) > 5


def test_every_variable_is_defined_and_has_a_provisioned_data_source() -> None:
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/millstream.yaml").read_text())
    types = {source["type"] for source in provisioned["datasources"]}
    for board in DASHBOARDS:
        defined = {variable["name"]: variable for variable in board["templating"]["list"]}
        used = set(re.findall(r"\$\{?([a-z]\w*)", str(board["panels"])))
        assert used == set(defined)
        assert {v["query"] for v in defined.values() if v["type"] == "datasource"} <= types
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/millstream.yaml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


@pytest.mark.slow
@pytest.mark.skipif(not TSC.exists(), reason="Grafana's types are not installed: run `make ops`, which needs npm")
def test_the_dashboards_have_the_types_of_grafana(tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(TSC.parents[1])
    sources = {path.stem: path.read_text() for path in FOLDER.glob("*.json")}
    sources["wrong"] = sources["millstream"].replace('"graphTooltip": 1', '"graphTooltip": "1"')
    for name, text in sources.items():
        head = 'import type { Dashboard } from "@grafana/schema";\nexport const board: Dashboard = '
        (tmp_path / f"{name}.ts").write_text(f"{head}{text};\n")
    options = [
        "--strict",
        "--skipLibCheck",
        "--moduleResolution",
        "bundler",
        "--module",
        "esnext",
        "--target",
        "es2022",
    ]
    done = subprocess.run(
        [str(TSC), "--noEmit", *options, *(f"{name}.ts" for name in sources)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error TS" in line]
    assert [line.partition("(")[0] for line in errors] == ["wrong.ts"], done.stdout
