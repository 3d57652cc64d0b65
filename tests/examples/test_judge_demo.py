"""`make demo-judge`, with single verdicts and with those of groups, and its control."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.judge import scripted
from millstream.pipeline.tracing import rubric
from millstream.pipeline.tracing.judge import DEFAULT, fenced

ROOT = Path(__file__).parents[2]


def demo(run_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.judge.demo", "--run-dir", str(run_dir), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=ROOT)


def test_the_judge_knows_both_kinds_of_questions() -> None:
    asked = DEFAULT.format(task='{"question": "8 plus 3 ?"}', answer=fenced("add"))
    assert scripted.verdict(asked) == "Score: 1.0 - it says 'add'"
    answers = "\n\n".join(fenced(f"assistant: {word}", number) for number, word in enumerate(("then", "add"), 1))
    asked = rubric.DEFAULT.format(task='{"question": "8 minus 3 ?"}', answers=f"{fenced('user: 8', 0)}\n\n{answers}")
    assert rubric.scores_in(scripted.verdict(asked), 2) == [0.0, 0.125]


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [[], ["--rubric"]])
def test_the_agent_learns_what_the_judge_likes(tmp_path: Path, options: list[str]) -> None:
    learnt = demo(tmp_path, *options)
    assert learnt.returncode == 0, learnt.stdout + learnt.stderr
    assert "the agent learnt" in learnt.stdout


@pytest.mark.torch
@pytest.mark.slow
def test_without_learning_it_does_not(tmp_path: Path) -> None:
    control = demo(tmp_path, "--lr", "0", "--steps", "3", "--rubric")
    assert control.returncode == 1, control.stdout + control.stderr
    *_, last = control.stdout.strip().splitlines()
    assert last.endswith("the agent did not learn")
    assert float(last.partition("validation ")[2].partition(":")[0]) < 0.2
