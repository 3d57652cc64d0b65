"""A run that was ended early, and what a new model learns from its records: more than its own model knew."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
STEPS = 7
FILE = """
run = "second"
run_dir = "{folder}/run"
strategy = "memory"
agent = "examples.calculator.agent:agent"
val_tasks = "{first}/val.jsonl"

[algorithm]
type = "sft"
model = "{first}/model"
lr = {lr}
epochs = 10
best_of_group = 0
{choice}

[algorithm.data]
store = "chdb://{first}/store"
"""

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of the demo after a few steps, and the held-out reward of its last model."""
    folder = tmp_path_factory.mktemp("first")
    command = [sys.executable, "-m", "examples.calculator.demo", "--run-dir", folder, "--max-steps", str(STEPS)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (folder / "summary.json").exists(), ended.stdout + ended.stderr
    return folder, json.loads((folder / "summary.json").read_text())["validation_reward"]


@pytest.mark.parametrize(
    ("lr", "choice", "learns"),
    [
        pytest.param(1e-3, "min_reward = 0.5", True, id="right answers"),
        pytest.param(0.0, "min_reward = 0.5", False, id="lr=0"),
        pytest.param(1e-3, "", False, id="all answers, as if rewards were shuffled"),
    ],
)
def test_a_new_model_learns_more_from_the_right_answers_than_the_one_that_gave_them(
    first: tuple[Path, float], tmp_path: Path, lr: float, choice: str, learns: bool
) -> None:
    folder, before = first
    file = tmp_path / "train.toml"
    file.write_text(FILE.format(folder=tmp_path, first=folder, lr=lr, choice=choice))
    command = [sys.executable, "-m", "millstream.pipeline", "train", str(file), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (summary,) = json.loads(done.stdout) if done.stdout.startswith("[") else [json.loads(done.stdout)]
    after = summary["validation_reward"]
    print(f"{before=:.2f} {after=:.2f}")
    assert before < 0.6
    assert (after > before + 0.2) == learns
