"""What a role exports, read as Prometheus reads it, and checked against the catalogue."""

import shutil
import subprocess

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from millstream.schemas.metrics import CATALOGUE, Metric

BY_NAME: dict[str, Metric] = {metric.name: metric for section in CATALOGUE.values() for metric in section}
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
