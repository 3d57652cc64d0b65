"""What the agents use of Millstream: a reward for each step, and a span for each tool call."""

import json
import os
from typing import Any

import millstream as ms

LEDGER = "CALCULATOR_LEDGER"  # a file that tests compare with what Millstream says happened


def score(step: int, right: bool, rollout: Any = None) -> None:
    """Half a point for a right step."""
    ms.emit_reward(0.5 if right else 0.0, name=f"step-{step}")
    if LEDGER in os.environ:
        who = {"rollout": rollout and rollout.rollout_id, "attempt": rollout and rollout.attempt_id}
        line = json.dumps(who | {"step": step, "right": right}) + "\n"
        file = os.open(os.environ[LEDGER], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line.encode())  # one write: lines of processes and threads never mix
        finally:
            os.close(file)


def tool_called(name: str, known: bool) -> None:
    """Records a tool call, also of a tool that does not exist."""
    attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name}
    ms.emit_span(f"execute_tool {name}", attributes if known else attributes | {"error.type": "unknown_tool"})
