"""What a runner counts: once an attempt, not once a span."""

from prometheus_client import CollectorRegistry

from millstream.producers.instruments import counter, histogram
from millstream.schemas import metrics
from millstream.schemas.spans import semconv


class RunnerMetrics:
    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self._attempts = counter(metrics.ATTEMPTS, registry)
        self._seconds = histogram(metrics.ATTEMPT_SECONDS, registry)
        self._spans = counter(metrics.SPANS, registry)
        self._processes = counter(metrics.AGENT_PROCESSES_ENDED, registry)
        self._dead = counter(metrics.DEAD_LETTERS, registry)

    def ended(self, status: str, seconds: float, spans: int) -> None:
        """The end of an attempt is written, after its ``spans``."""
        self._attempts.labels(status).inc()
        self._seconds.observe(seconds)
        self._spans.labels(semconv.SOURCE_AGENT).inc(spans)

    def late_span(self) -> None:
        self._spans.labels(semconv.SOURCE_AGENT).inc()

    def process_ended(self, reason: str) -> None:
        self._processes.labels(reason).inc()

    def dead_letter(self, reason: str) -> None:
        self._dead.labels("runner", reason).inc()
