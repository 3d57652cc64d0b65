"""What an adapter counts. It sees each end exactly once, so these are totals and need no correction."""

from typing import Final

from prometheus_client import CollectorRegistry

from millstream.consumers.adapter.settle import ROLE
from millstream.consumers.adapter.transaction import Transaction
from millstream.producers.instruments import counter, histogram
from millstream.schemas import metrics
from millstream.schemas.wire import status

MODES: Final = ("train", "val", "test")  # what else a publisher may write is one label, not any number of them


class AdapterMetrics:
    """Counted once the transaction that holds a decision is committed; late records, when they are read."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ends = counter(metrics.ROLLOUT_ENDS, registry)
        self._seconds = histogram(metrics.ROLLOUT_SECONDS, registry)
        self._queued = histogram(metrics.QUEUED_SECONDS, registry)
        self._retries = counter(metrics.RETRIES, registry)
        self._lost = counter(metrics.LOST_ATTEMPTS, registry)
        self._dead = counter(metrics.DEAD_LETTERS, registry)
        self._transactions = counter(metrics.TRANSACTIONS, registry)
        self._transaction_s = histogram(metrics.TRANSACTION_SECONDS, registry)
        self._late = counter(metrics.LATE_RECORDS, registry)

    def committed(self, work: Transaction, took_s: float) -> None:
        self._transactions.labels("committed").inc()
        self._transaction_s.observe(took_s)
        for _, _, letter in work.dead:
            self._dead.labels(ROLE, letter.reason).inc()
        for _, _, decision in work.decisions:
            end = decision.end
            mode = end.mode if end.mode in MODES else "other"
            self._lost.inc(decision.how == status.LOST)
            if end.attempts == 1 and end.started_at is not None:
                self._queued.labels(mode).observe(max(end.started_at - end.created_at, 0) / 1e9)
            if decision.retry is not None:
                self._retries.labels(decision.how).inc()
                continue
            self._ends.labels(mode, end.status).inc()
            self._seconds.labels(mode).observe(max(end.ended_at - end.created_at, 0) / 1e9)
            for _, reason, _ in decision.dead:
                self._dead.labels(ROLE, reason).inc()

    def aborted(self) -> None:
        self._transactions.labels("aborted").inc()

    def reduced(self) -> None:
        self._transactions.labels("reduced").inc()

    def late(self, kind: str) -> None:
        self._late.labels(kind).inc()
