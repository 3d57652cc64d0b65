"""Prometheus' instruments, made from the catalogue (`schemas.metrics`), and values that are asked for at a scrape."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from millstream.schemas.metrics import Metric

Values = float | Mapping[tuple[str, ...], float] | None  # by the values of the labels; None: absent

disable_created_metrics()  # type: ignore[no-untyped-call] # a gauge beside each counter, which nobody asks for


def counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.meaning, metric.labels, registry=registry)


def gauge(metric: Metric, registry: CollectorRegistry) -> Gauge:
    return Gauge(metric.name, metric.meaning, metric.labels, registry=registry)


def histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(metric.name, metric.meaning, metric.labels, registry=registry, buckets=metric.buckets)


class Exported:
    """A collector of what a role counts itself, as a gauge or counter. ``values`` is called at each scrape, from any
    thread."""

    def __init__(self, metric: Metric, values: Callable[[], Values]) -> None:
        self._metric = metric
        self._values = values

    def describe(self) -> Iterable[Family]:
        yield self._family()

    def collect(self) -> Iterable[Family]:
        values, family = self._values(), self._family()
        if values is None:
            return
        by_labels = values if isinstance(values, Mapping) else {(): values}
        for labels, value in sorted(by_labels.items()):
            family.add_metric(list(labels), value)
        yield family

    def _family(self) -> CounterMetricFamily | GaugeMetricFamily:
        metric = self._metric
        kind = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
        return kind(metric.name, metric.meaning, labels=metric.labels)
