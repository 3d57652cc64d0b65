"""What an adapter counts. It sees each end exactly once, so these are totals and need no correction."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from millstream.consumers.adapter.transaction import Transaction
from millstream.schemas import metrics
from millstream.schemas.metrics import Metric
from millstream.schemas.wire import status


class AdapterMetrics:
    """Counted once the transaction that holds a decision is committed; late records, when they are read."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(metric: Metric) -> Counter:
            return Counter(metric.name, metric.meaning, metric.labels, registry=registry)

        def histogram(metric: Metric) -> Histogram:
            return Histogram(metric.name, metric.meaning, metric.labels, registry=registry, buckets=metric.buckets)

        self._ends = counter(metrics.ROLLOUT_ENDS)
        self._seconds = histogram(metrics.ROLLOUT_SECONDS)
        self._queued = histogram(metrics.QUEUED_SECONDS)
        self._retries = counter(metrics.RETRIES)
        self._lost = counter(metrics.LOST_ATTEMPTS)
        self._dead = counter(metrics.DEAD_LETTERS)
        self._aborted = counter(metrics.TRANSACTIONS_ABORTED)
        self._late = counter(metrics.LATE_RECORDS)

    def committed(self, work: Transaction) -> None:
        for _, _, letter in work.dead:
            self._dead.labels(letter.reason).inc()
        for _, _, decision in work.decisions:
            end = decision.end
            self._lost.inc(decision.how == status.LOST)
            if end.attempts == 1 and end.started_at is not None:
                self._queued.labels(end.mode).observe(max(end.started_at - end.created_at, 0) / 1e9)
            if decision.retry is not None:
                self._retries.labels(decision.how).inc()
                continue
            self._ends.labels(end.mode, end.status).inc()
            self._seconds.labels(end.mode).observe(max(end.ended_at - end.created_at, 0) / 1e9)
            for _, reason, _ in decision.dead:
                self._dead.labels(reason).inc()

    def aborted(self) -> None:
        self._aborted.inc()

    def late(self, kind: str) -> None:
        self._late.labels(kind).inc()
