"""A run that was ended early, and what a new model, or its own, learns from its records: more than it knew."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

import millstream as ms
from millstream.pipeline.algorithms.recorded.offline import Offline
from millstream.pipeline.algorithms.recorded.preference import PreferenceLearner
from millstream.pipeline.algorithms.recorded.source import recorded
from millstream.pipeline.algorithms.recorded.supervised import Supervised
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.training.algorithm import Algorithm
from millstream.pipeline.training.datasets import PairChoice
from millstream.schemas.wire.records import Triplet

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


def shuffled(rollouts: Sequence[Sequence[Triplet]]) -> list[list[Triplet]]:
    """Each with the rewards of another rollout of its group, turn by turn."""
    earned: dict[tuple[str, int], list[float | None]] = {}
    for turn in (turn for rollout in rollouts for turn in rollout):
        earned.setdefault((turn.group_id, turn.turn), []).append(turn.reward)
    for rewards in earned.values():
        random.Random(0).shuffle(rewards)
    return [[replace(turn, reward=earned[turn.group_id, turn.turn].pop()) for turn in rollout] for rollout in rollouts]


def preferences(model: Path, rollouts: Sequence[Sequence[Triplet]], lr: float) -> Algorithm:
    learner = PreferenceLearner(model, lr=lr, epochs=1, choice=PairChoice(every=True))
    return Supervised(learner, rollouts, epochs=4)


def policy_gradient(model: Path, rollouts: Sequence[Sequence[Triplet]], lr: float) -> Algorithm:
    return Offline(TorchLearner(model, lr=lr, correction="decoupled"), rollouts)


@pytest.mark.parametrize(
    ("algorithm", "lr", "right", "learns"),
    [
        pytest.param(preferences, 3e-4, True, True, id="pairs"),
        pytest.param(preferences, 3e-4, False, False, id="pairs, rewards shuffled"),
        pytest.param(preferences, 0.0, True, False, id="pairs, lr=0"),
        pytest.param(policy_gradient, 3e-4, True, True, id="groups"),
        pytest.param(policy_gradient, 3e-4, False, False, id="groups, rewards shuffled"),
    ],
)
def test_a_model_learns_more_from_the_pairs_and_groups_that_it_was_trained_with(
    first: tuple[Path, float],
    tmp_path: Path,
    algorithm: Callable[[Path, Sequence[Sequence[Triplet]], float], Algorithm],
    lr: float,
    right: bool,
    learns: bool,
) -> None:
    """Without its agent's being run, except to validate."""
    folder, before = first
    rollouts = recorded(ms.load_settings(), store=f"chdb://{folder}/store")
    tasks = [json.loads(line)["input"] for line in (folder / "val.jsonl").read_text().splitlines()]
    trainer = ms.Trainer(
        algorithm=algorithm(folder / "last", rollouts if right else shuffled(rollouts), lr),
        agent="examples.calculator.agent:agent",
        val_tasks=tasks,
        run_dir=tmp_path,
    )
    after = trainer.fit().validation_reward
    print(f"{before=:.2f} {after=:.2f}")
    assert after is not None
    assert (after > before + 0.1) == learns
