"""Counts duration, tokens and errors of attempts for Prometheus, and records a span of kind "alert" for a slow one."""

from typing import Any

from prometheus_client import Counter, Histogram

import millstream as ms

# Counted in the process that the agent runs in. The runner's /metrics adds up its processes.
SECONDS = Histogram(
    "agent_seconds",
    "How long agents ran, by how they ended. The count gives attempts and error rate.",
    ["agent", "status"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600),
)
TOKENS = Counter("agent_tokens", "Tokens that agents' own spans report.", ["agent", "direction"])
SLOW = Counter("agent_slow", "Attempts that ran for longer than the monitor's threshold.", ["agent"])


class Monitor(ms.Hook):
    def __init__(self, threshold_s: float = 300.0) -> None:
        super().__init__()
        self._threshold_s = threshold_s

    def on_trace_end(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        SECONDS.labels(runner.agent, tracer.status).observe(tracer.duration_s)
        TOKENS.labels(runner.agent, "input").inc(tracer.input_tokens)
        TOKENS.labels(runner.agent, "output").inc(tracer.output_tokens)
        if tracer.duration_s > self._threshold_s:
            SLOW.labels(runner.agent).inc()
            # The attribute makes it an alert: SELECT * FROM spans WHERE kind = 'alert'
            ms.emit_span("slow attempt", {"millstream.alert": "slow", "duration_s": round(tracer.duration_s, 3)})
