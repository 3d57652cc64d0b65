"""`make demo-apo` and its control."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.prompts import scripted


def demo(run_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.prompts.demo", "--run-dir", str(run_dir), "--answer-s", "0.0", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2])


def test_the_student_answers_as_the_prompt_asks() -> None:
    every = " ".join([scripted.FIRST, *scripted.RULES.values()])
    tasks = scripted.tasks(0, 30)
    assert all(scripted.student(every, task["question"]) == task["answer"] for task in tasks)
    assert not any(scripted.student(scripted.FIRST, task["question"]) == task["answer"] for task in tasks)


@pytest.mark.slow
def test_the_demo_finds_a_better_prompt_and_its_control_does_not(tmp_path: Path) -> None:
    found = demo(tmp_path / "demo")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "the models of this demo are scripted" in found.stdout
    assert "watch it in a browser: http://127.0.0.1:" in found.stdout
    best = json.loads((tmp_path / "demo/prompts.json").read_text())
    assert all(rule in best["prompts"]["system"]["template"] for rule in scripted.RULES.values())
    control = demo(tmp_path / "control", "--control")
    assert control.returncode == 1, control.stdout + control.stderr
    assert "the prompt did not get better" in control.stdout
