"""Ten slow steps. The first attempt is killed at step seven; the next one goes on there."""

import os
import signal

import millstream as ms

STEPS = 10
KILLED_AT = 7


def agent(topic: str, *, rollout) -> str:
    state = ms.load_state() or {"step": 1, "notes": []}
    for step in range(state["step"], STEPS + 1):
        ms.save_state({"step": step, "notes": state["notes"]})  # what is done so far: step comes next
        if step == KILLED_AT and rollout.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # as a machine dies
        state["notes"].append(f"{topic}: note {step}, by attempt {rollout.attempt}")
        ms.emit_span("step", {"step": step})
    ms.emit_reward(len(state["notes"]) / STEPS)
    return "\n".join(state["notes"])
