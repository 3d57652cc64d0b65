"""What a role exports, read as Prometheus reads it, and checked against the catalogue; names and labels of queries."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from millstream.schemas.metrics import CATALOGUE, Metric

BY_NAME: dict[str, Metric] = {metric.name: metric for section in CATALOGUE.values() for metric in section}
FROM_SCRAPING = {"job", "instance", "role", "le"}
FROM_CLIENT = {"up", "process_cpu_seconds_total", "process_resident_memory_bytes"}  # or from Prometheus itself
VLLM = Path(__file__).with_name("vllm") / "metrics.txt"  # of a real one that had answered; tests/vllm compares it
OTHERS = ("process_", "python_", "my_", "agent_")  # the client library's own, and those of hooks


def text_of(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def exported(text: str) -> set[str]:
    """The names of all families, those without a sample included."""
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}


def checked(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels. Every family must be in the catalogue with its type, meaning and labels, every series
    there once; promtool, where it is installed, must find nothing."""
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = samples.setdefault(sample.name, {})
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in series, f"{sample.name} {labels} twice"
            series[labels] = sample.value
        if family.name.startswith(OTHERS):
            continue
        metric = BY_NAME[family.name]
        assert (family.type, family.documentation) == (metric.type, metric.meaning)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample
    if (promtool := shutil.which("promtool")) is not None:  # Debian's package prometheus
        said = subprocess.run([promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False)
        assert (said.returncode, said.stdout + said.stderr) == (0, "")
    return samples


def series(rules: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Labels by the names that Prometheus has: of metrics, and of the records among the rules."""
    found: dict[str, set[str]] = {name: set() for name in FROM_CLIENT}
    for metric in BY_NAME.values():
        parts = ("_bucket", "_sum", "_count") if metric.type == "histogram" else ("",)
        found |= {f"{metric.exported}{part}": set(metric.labels) for part in parts}
    for rule in rules:
        if "record" in rule:
            by = re.match(r"sum by \(([\w, ]*)\)", rule["expr"])
            found[rule["record"]] = set(by[1].split(", ")) if by else set()
    return found | labels_by_name(VLLM.read_text())


def labels_by_name(text: str) -> dict[str, set[str]]:
    """Labels of the samples that a server exports, by their names, without those of scraping."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(set(sample.labels) - FROM_SCRAPING)
    return found


def labels_of(query: str, known: Mapping[str, set[str]]) -> set[str]:
    """The labels that the series of a PromQL query may have. Asserts that each name and label in it exists."""
    names = set(re.findall(r"\b(?:millstream[_:]|process_|vllm:)[\w:]+|\bup\b", query))
    assert names
    assert names <= set(known)
    for name, matchers in re.findall(r"(\w[\w:]*)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)\s*[=!]~?", matchers)) <= known[name] | FROM_SCRAPING
    labels = FROM_SCRAPING.union(*(known[name] for name in names))
    for grouping in re.findall(r"(?:by|on|ignoring|group_left) ?\(([\w, ]*)\)", query):
        assert set(filter(None, grouping.split(", "))) <= labels
    return labels
