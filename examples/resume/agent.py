"""An agent of ten steps. Its first attempt kills itself at step seven; the next one resumes there."""

import os
import signal

import millstream as ms

STEPS = 10
KILLED_AT = 7


def agent(topic: str, *, rollout) -> str:
    state = ms.load_state() or {"step": 1, "notes": []}
    for step in range(state["step"], STEPS + 1):
        ms.save_state({"step": step, "notes": state["notes"]})  # the notes so far, and the step to do next
        if step == KILLED_AT and rollout.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # simulates a crash of the machine
        state["notes"].append(f"{topic}: note {step}, by attempt {rollout.attempt}")
        ms.emit_span("step", {"step": step})
    ms.emit_reward(len(state["notes"]) / STEPS)
    return "\n".join(state["notes"])
