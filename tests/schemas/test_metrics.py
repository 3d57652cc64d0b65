"""The catalogue of metrics: one meaning a name, Prometheus' conventions, bounded labels."""

import re
from collections import Counter

import pytest

from millstream.schemas import metrics
from millstream.schemas.metrics import CATALOGUE, Metric

ALL = [metric for section in CATALOGUE.values() for metric in section]
UNBOUNDED = {
    "rollout",
    "rollout_id",
    "group_id",
    "attempt",
    "worker",
    "worker_id",
    "instance",
    "version",
    "le",
    "quantile",
}


def test_every_metric_is_in_one_section_under_a_name_of_its_own() -> None:
    """Defects 3 and 6: one name, one meaning, one list."""
    defined = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert len(defined) > 50
    assert Counter(ALL) == Counter(defined)
    assert {name for name, n in Counter(metric.name for metric in ALL).items() if n > 1} == set()


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_names_follow_prometheus_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"millstream(_[a-z]+)+", metric.name)
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket", "_info_total"))
    assert not re.search(r"_(ms|milliseconds|minutes|hours|kb|mb|percent)(_|$)", metric.name), "base units only"
    assert metric.meaning.endswith(".")
    assert bool(metric.buckets) == (metric.type == "histogram")
    assert list(metric.buckets) == sorted(metric.buckets)
    if "_seconds" in metric.name or "_bytes" in metric.name:
        assert metric.unit, "the unit ends the name"


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_labels_are_bounded(metric: Metric) -> None:
    """Defect 5: no quantile labels; what grows with the rollouts is no label."""
    unbounded = UNBOUNDED - ({"version"} if metric is metrics.BUILD_INFO else set())
    assert not unbounded & set(metric.labels)
    if "experiment" in metric.labels:
        assert metric in CATALOGUE["Trainer"]
