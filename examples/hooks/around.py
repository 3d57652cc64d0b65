"""What surrounds each attempt of the agent: the four hooks that come with Millstream, and one of our own."""

import time
from typing import Any

import millstream as ms


def load_index() -> dict[str, str]:
    time.sleep(0.2)  # a model or a connection would take longer
    return {"France": "Paris", "Switzerland": "Bern"}


class Greeter(ms.Hook):
    """Notes in the trace on which machine the attempt runs."""

    async def on_trace_start(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        ms.emit_span("greeting", {"host": runner.host, "attempt": rollout.attempt})


index = ms.WarmUp(load_index)
monitor = ms.PerformanceMonitor(threshold_s=60)  # webhook="https://…" tells people
errors = ms.ErrorHandler({KeyError: "fail", ConnectionError: "retry", StopIteration: "ignore"})
backup = ms.StateBackup("runs/hooks")  # or "s3://bucket/folder", where s3fs is installed
