import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_hooks_example_runs_as_its_readme_says(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "examples.hooks"]
    answer = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=120)
    said = [line.split() for line in answer.stdout.splitlines()]
    assert [how for how, _ in said] == ["succeeded", "failed", "succeeded"]
    states = []
    for _, rollout_id in said:
        (path,) = (tmp_path / "runs" / "hooks" / rollout_id).glob("*.json")
        states.append(json.loads(path.read_text()))
    assert [(s["input"], s["output"], s["error"]) for s in states] == [
        ("France", "Paris", None),
        ("Atlantis", None, "KeyError: 'Atlantis'"),
        ("", None, "StopIteration: "),
    ]
    assert all(s["spans"] == {"span": 1, "agent": 1} for s in states)  # the greeting and the root
