"""Writes each attempt's input, output and figures to ``<folder>/<rollout_id>/<attempt_id>.json``."""

import json
from pathlib import Path
from typing import Any

import millstream as ms


class Backup(ms.Hook):
    """An attempt whose process dies leaves no file."""

    timeout_s = 30.0

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = Path(folder).absolute()

    def on_trace_end(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        state = {
            "input": rollout.input,
            "metadata": dict(rollout.metadata),
            "attempt": rollout.attempt,
            "status": tracer.status,
            "error": None if tracer.error is None else f"{type(tracer.error).__name__}: {tracer.error}",
            "output": None if tracer.output is None else json.loads(tracer.output),
            "duration_s": round(tracer.duration_s, 3),
            "spans": dict(tracer.kinds),
            "tokens": {"input": tracer.input_tokens, "output": tracer.output_tokens},
            "host": runner.host,
        }
        file = self._folder / rollout.rollout_id / f"{rollout.attempt_id}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")  # renamed when it is complete: a reader never sees half a file
        part.write_text(json.dumps(state, indent=2))
        part.replace(file)
