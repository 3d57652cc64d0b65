"""What is shipped for Prometheus: the names exist, alerts have a line each in the runbook, and rules do as they say."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from exposition import labels_of, series

from millstream.schemas.wire.topics import LIFETIMES

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule["alert"] for rule in RULES if "alert" in rule]

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_name_and_label_of_a_rule_exists(rule: dict[str, Any]) -> None:
    labels = labels_of(rule["expr"], series(RULES))
    assert set(re.findall(r"\$labels\.(\w+)", str(rule.get("annotations")))) <= labels


def test_every_alert_has_a_severity_a_summary_and_a_line_in_the_runbook() -> None:
    lines = re.findall(r"^\| `(Millstream\w+)` \|", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert lines == ALERTS
    assert len(set(ALERTS)) == len(ALERTS) > 20
    for rule in RULES:
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning", "info")
            assert rule["annotations"]["summary"]


def test_the_alert_on_retention_knows_how_long_the_topics_keep_records() -> None:
    (rule,) = (rule for rule in RULES if rule.get("alert") == "MillstreamRetentionNear")
    assert int(rule["expr"].rpartition("> ")[2]) == LIFETIMES.record_s // 2


@promtool
@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yml"), ("check", "config", "prometheus.yml")])
def test_promtool_accepts_what_is_shipped(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    shutil.copytree(FOLDER, tmp_path / "prometheus")
    (tmp_path / "prometheus" / "gateway-token").touch()
    run_promtool(tmp_path / "prometheus", *arguments)


@promtool
def test_the_rules_fire_and_clear_as_they_should() -> None:
    run_promtool(Path(__file__).parent, "test", "rules", "rules_test.yml")


def run_promtool(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
