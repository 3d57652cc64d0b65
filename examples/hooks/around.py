"""The hooks around each attempt of the agent."""

import time
from typing import Any

import millstream as ms
from examples.hooks.backup import Backup
from examples.hooks.errors import ErrorHandler
from examples.hooks.monitor import Monitor
from examples.hooks.warm_up import WarmUp


def load_index() -> dict[str, str]:
    time.sleep(0.2)  # a model or a connection would take longer
    return {"France": "Paris", "Switzerland": "Bern"}


class Greeter(ms.Hook):
    """Records in the trace which machine the attempt runs on."""

    async def on_trace_start(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        ms.emit_span("greeting", {"host": runner.host, "attempt": rollout.attempt})


index = WarmUp(load_index)
monitor = Monitor(threshold_s=60)
errors = ErrorHandler({KeyError: "fail", ConnectionError: "retry", StopIteration: "ignore"})
backup = Backup("runs/hooks")
