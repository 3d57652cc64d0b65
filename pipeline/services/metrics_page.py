"""Writes docs/metrics.md from the catalogue: ``python -m millstream.pipeline.services.metrics_page``."""

from pathlib import Path
from typing import Final

from millstream.schemas.metrics import CATALOGUE, Metric

PAGE: Final = Path("docs/metrics.md")

HEAD: Final = """# Metrics

<!-- Written by `python -m millstream.pipeline.services.metrics_page` from schemas/metrics.py: edit that file. -->

Each role serves its metrics at `/metrics` of its `--health-port`, the gateway at its own port (with its token).
Every process also exports `process_*`: CPU seconds, memory, file descriptors and its start.

Histograms have `_bucket`, `_sum` and `_count`. Labels are bounded: never a rollout, group, attempt, worker or model
version. What tells replicas apart is Prometheus' own `instance`. An `experiment` is a label at the trainer alone.
`millstream_build_info` says what runs where: `rate(process_cpu_seconds_total[1m]) * on (instance) group_left (role)
millstream_build_info` is the CPU time by role.
"""


def page() -> str:
    """Markdown."""
    sections = [HEAD]
    for title, metrics in CATALOGUE.items():
        rows = "\n".join(map(_row, metrics))
        sections.append(f"## {title}\n\n| name | type | labels | unit | meaning |\n|---|---|---|---|---|\n{rows}\n")
    return "\n".join(sections)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.exported}` | {metric.type} | {labels} | {metric.unit} | {metric.meaning} |"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
