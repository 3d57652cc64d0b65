"""The hooks that a user copies: the example as a whole, and each hook where a runner has more than one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runner_rig import running, write_agent

import millstream as ms
from examples.hooks.backup import Backup
from examples.hooks.errors import ErrorHandler
from examples.hooks.monitor import SLOW, TOKENS, Monitor
from examples.hooks.warm_up import WarmUp


def test_the_hooks_example_runs_as_its_readme_says(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "examples.hooks"]
    answer = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=120)
    said = [line.split() for line in answer.stdout.splitlines()]
    assert [how for how, _ in said] == ["succeeded", "failed", "succeeded"]
    states = []
    for _, rollout_id in said:
        (path,) = (tmp_path / "runs" / "hooks" / rollout_id).iterdir()
        states.append(json.loads(path.read_text()))
    assert [(s["input"], s["output"], s["error"]) for s in states] == [
        ("France", "Paris", None),
        ("Atlantis", None, "KeyError: 'Atlantis'"),
        ("", None, "StopIteration: "),
    ]
    assert all(s["spans"] == {"span": 1} for s in states)  # the greeting


WARM = """
    import os, time
    from examples.hooks.warm_up import WarmUp

    def load():
        with open("loaded", "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(0.2)
        return os.getpid()

    model = WarmUp(load)

    def agent(input):
        return {"model": model.value, "pid": os.getpid()}
"""


async def test_warm_up_loads_once_in_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    write_agent(tmp_path, WARM, "warm.py")
    async with running("warm:agent", tmp_path, processes=2, concurrency=3, hooks=["warm:model"]) as rig:
        await rig.publish(range(12))
        ended = await rig.ends(12)
    found = [json.loads(one.last.output or "") for one in ended.values()]
    assert all(one["model"] == one["pid"] for one in found)
    loaded = (tmp_path / "loaded").read_text().split()
    assert sorted(set(loaded)) == sorted(loaded)
    assert set(loaded) == {str(one["pid"]) for one in found}


def test_warm_up_loads_again_after_a_failure() -> None:
    calls: list[int] = []

    def load() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("not there yet")
        return "ready"

    warm = WarmUp(load)
    with pytest.raises(OSError, match="not there yet"):
        _ = warm.value
    assert [warm.value, warm.value, len(calls)] == ["ready", "ready", 2]


async def test_the_monitor_counts_and_records_an_alert_for_a_slow_attempt() -> None:
    def agent(task: Any) -> None:
        usage = {"gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 3}
        ms.emit_span("call", {"gen_ai.operation.name": "chat", **usage})

    async with running(agent, hooks=[Monitor(threshold_s=0.0)]) as rig:
        await rig.publish([1])
        (one,) = (await rig.ends(1)).values()
    assert [span.name for span in one.spans if span.kind == "alert"] == ["slow attempt"]
    (name,) = {labels["agent"] for labels in (s.labels for m in SLOW.collect() for s in m.samples)}
    assert TOKENS.labels(name, "input")._value.get() == 7
    assert TOKENS.labels(name, "output")._value.get() == 3
    assert SLOW.labels(name)._value.get() == 1


async def test_the_error_handler_takes_the_nearest_base_class() -> None:
    handler = ErrorHandler({LookupError: "retry", KeyError: "fail"})
    errors = [KeyError(), IndexError(), TypeError()]
    assert [await handler.on_error(None, None, None, error) for error in errors] == ["fail", "retry", None]


async def test_the_backup_holds_what_went_in_and_what_came_out(tmp_path: Path) -> None:
    async with running(lambda task: {"n": task}, hooks=[Backup(str(tmp_path))]) as rig:
        await rig.publish([1])
        (one,) = (await rig.ends(1)).values()
    state = json.loads((tmp_path / one.last.rollout_id / f"{one.last.attempt_id}.json").read_text())
    assert (state["input"], state["status"], state["output"]) == (1, "succeeded", {"n": 1})
