# ruff: noqa: E402 — torch comes with the `train` extra
"""Fine-tuning on what was recorded: by the trainer, from a store, and again where it was interrupted."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from factories import finished, tokens
from typer.testing import CliRunner

import millstream as ms
from examples.calculator import model
from millstream.pipeline.algorithms.policy_gradient import NothingToLearn
from millstream.pipeline.algorithms.recorded.imitation import ImitationLearner
from millstream.pipeline.algorithms.recorded.offline import Offline
from millstream.pipeline.algorithms.recorded.preference import PreferenceLearner
from millstream.pipeline.algorithms.recorded.supervised import Supervised
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.cli.main import app
from millstream.pipeline.models.policy import digest, load_model, parameters
from millstream.pipeline.training.algorithm import Algorithm
from millstream.pipeline.training.datasets import Choice
from millstream.pipeline.training.report import Summary
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.records import Triplet

pytestmark = pytest.mark.torch

ROLLOUTS = [
    list(finished(f"r{n}", [tokens([2, 5, n], [n + 1], [-1.0]) | {"reward": n / 8}]).triplets) for n in range(8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.create(path, seed=1)
    return path


def fit(folder: Path, run_dir: Path, steps: int | None = None, rollouts: Any = ROLLOUTS) -> Summary:
    learner = ImitationLearner(folder, choice=Choice(), epochs=1, minibatch=2, lr=1e-2)
    return train(Supervised(learner, rollouts, epochs=2, rows_per_step=3), run_dir, steps)


def train(algorithm: Algorithm, run_dir: Path, steps: int | None = None) -> Summary:
    return ms.Trainer(algorithm=algorithm, run_dir=run_dir, max_steps=steps, seed=5).fit()


def weights(run_dir: Path) -> str:
    return digest(parameters(load_model(run_dir / "last")))


def test_it_goes_over_the_data_and_an_interruption_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """Neither agent, tasks nor model server are needed. The steps are in the store."""
    whole = fit(folder, tmp_path / "whole")
    assert [step.step for step in whole.steps] == list(range(6))  # two epochs of 3 + 3 + 2 rows
    assert [step.rollouts for step in whole.steps] == [3, 3, 2] * 2
    assert whole.steps[-1].metrics["ce"] < whole.steps[0].metrics["ce"]
    fit(folder, tmp_path / "parts", 2)
    assert weights(tmp_path / "parts") != weights(tmp_path / "whole")
    fit(folder, tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    store = ms.ClickHouseStore(ms.load_settings(clickhouse_dsn=f"chdb://{tmp_path}/whole/store"))
    ((steps, reward),) = store.sql("SELECT count(), avg(reward_mean) FROM training_steps").rows
    store.close()
    assert (steps, reward) == (6, pytest.approx(3.5 / 8, abs=0.05))


def compared(n: int, **fields: Any) -> list[Triplet]:
    """A right and a wrong answer to each of four questions."""
    turn = tokens([2, 5, n // 2], [n + 1], [-1.0]) | {"group_id": f"g{n // 2}", "response": str(n), "reward": n % 2}
    return list(finished(f"r{n}", [turn | fields]).triplets)


PAIRS = [compared(n) for n in range(8)]


def preferences(folder: Path) -> Algorithm:
    learner = PreferenceLearner(folder, pair_loss="kto", epochs=1, minibatch=4, lr=1e-2)
    return Supervised(learner, PAIRS, epochs=2, rows_per_step=4)


def offline(folder: Path) -> Algorithm:
    learner = TorchLearner(folder, epochs=1, minibatch=2, lr=1e-2, correction="decoupled")
    return Offline(learner, PAIRS, epochs=2, groups_per_step=2)


@pytest.mark.parametrize("algorithm", [preferences, offline])
def test_an_interruption_changes_nothing_of_pairs_and_groups(
    folder: Path, tmp_path: Path, algorithm: Callable[[Path], Algorithm]
) -> None:
    whole = train(algorithm(folder), tmp_path / "whole")
    assert [(step.step, step.rollouts, step.tokens) for step in whole.steps] == [(n, 4, 4) for n in range(4)]
    assert [step.reward for step in whole.steps] == [0.5] * 4
    train(algorithm(folder), tmp_path / "parts", 3)
    train(algorithm(folder), tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_tokens_of_another_policy_count_by_their_recorded_log_probabilities(folder: Path) -> None:
    """At most twice (`cap`): this policy would have sampled these answers e^-6 as often, or far more often."""
    sums = []
    for logprob in (0.0, -6.0, -9.0):
        rollouts = [compared(n, response_logprobs=struct.pack("<f", logprob)) for n in range(8)]
        learner = TorchLearner(folder, epochs=1, lr=0.0, entropy=0.0, max_grad_norm=1e9, correction="decoupled")
        algorithm = Offline(learner, rollouts, groups_per_step=4)
        algorithm.lesson(algorithm.items).learn()
        sums.append(sum(float(each.grad.norm()) for each in learner._model.parameters() if each.grad is not None))
    assert 0 < sums[0] < 0.2 * sums[1]
    assert sums[1] == pytest.approx(sums[2], rel=1e-4)


@pytest.mark.parametrize(
    ("rollouts", "reason"),
    [
        ([compared(n, response_logprobs=None) for n in range(8)], "as many log-probabilities as response tokens"),
        ([compared(n, trainable=False, reason="no model") for n in range(8)], "8 say: no model"),
        (PAIRS[::2], "none of 4 recorded groups has two rollouts"),
    ],
)
def test_groups_that_can_not_be_learnt_from_are_refused_with_the_reason(
    folder: Path, rollouts: list[list[Triplet]], reason: str
) -> None:
    with pytest.raises(NothingToLearn, match=reason):
        Offline(TorchLearner(folder), rollouts)


def test_a_run_that_goes_on_with_other_data_is_refused(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, 1)
    with pytest.raises(ConfigError, match="step-00000001 was made with other data"):
        fit(folder, tmp_path, rollouts=ROLLOUTS[1:])


def test_without_anything_to_learn_nothing_is_started(folder: Path) -> None:
    learner = ImitationLearner(folder, choice=Choice(min_reward=2.0))
    with pytest.raises(NothingToLearn, match="no call of the 8 of those recorded fits the other conditions"):
        Supervised(learner, ROLLOUTS)


@pytest.fixture(scope="module")
def recorded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run of two steps that learns nothing."""
    run_dir = tmp_path_factory.mktemp("recorded")

    def agent(task: dict[str, Any]) -> float:
        import openai

        answer = openai.OpenAI(api_key="unused").chat.completions.create(
            model="calculator", messages=[{"role": "user", "content": "add 3 to 8 ?"}], max_tokens=1
        )
        return float(len(answer.choices[0].message.content or "") % 2)

    algorithm = ms.GRPO(folder, lr=0.0, groups_per_step=2, group_size=2)
    ms.Trainer(algorithm=algorithm, agent=agent, run="first", run_dir=run_dir, max_steps=2).fit([{"n": 1}, {"n": 2}])
    return run_dir


def training_file(path: Path, folder: Path, recorded: Path, data: str = "", kind: str = "sft") -> Path:
    path.mkdir()
    text = f"""
run = "second"
run_dir = "{path}/run"
strategy = "memory"
[algorithm]
type = "{kind}"
model = "{folder}"
best_of_group = 0
"""
    if kind == "rft":
        (path / "tasks.jsonl").write_text('{"input": 1}\n')
        text = f'tasks = "{path}/tasks.jsonl"\n{text}'
    else:
        text += f'[algorithm.data]\nstore = "chdb://{recorded}/store"\n{data}'
    if kind not in ("sft", "rft"):
        text = text.replace("best_of_group = 0\n", "")
    file = path / "train.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_policy_gradients_learn_from_a_past_run(folder: Path, recorded: Path, tmp_path: Path, kind: str) -> None:
    """Without tasks or an agent. What they do not sample themselves is corrected, and the resolved file says so."""
    file = training_file(tmp_path / "t", folder, recorded, kind=kind)
    done = CliRunner().invoke(app, ["train", str(file), "--from-experiment", "first", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["algorithm"] == "Offline"
    assert record["config"]["algorithm"]["data"]["experiment"] == "first"
    assert record["config"]["algorithm"]["correction"] == record["arguments"]["learner"]["correction"] == "decoupled"
    assert record["arguments"]["groups"] == 4


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ("", 8),
        ('experiment = "first"', 8),
        ('sql = "SELECT rollout_id FROM rollouts WHERE reward > 0"', None),
        ('mode = "val"', "holds no triplets of experiment any, mode val"),
        ('experiment = "none"', "the store has no experiment 'none'; the newest are: "),
        ('sql = "DROP TABLE spans_raw"', "the store is readonly"),
        ('sql = "SELECT 1 WHERE 0"', "holds no triplets of SELECT 1 WHERE 0"),
    ],
)
def test_a_file_names_what_it_learns_from(
    folder: Path, recorded: Path, tmp_path: Path, data: str, rows: int | str | None
) -> None:
    file = training_file(tmp_path / "t", folder, recorded, data)
    done = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--json"])
    if isinstance(rows, str):
        assert done.exit_code == 1
        assert rows in " ".join(done.output.split()) or rows in str(done.exception)
        return
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["algorithm"] == "Supervised"
    assert len(record["data"]) == 64
    assert record["arguments"]["rows"] == rows or (rows is None and 0 < record["arguments"]["rows"] <= 8)


def test_an_experiment_can_be_named_when_training_starts(folder: Path, recorded: Path, tmp_path: Path) -> None:
    file = training_file(tmp_path / "t", folder, recorded)
    done = CliRunner().invoke(app, ["train", str(file), "--from-experiment", "first"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "t/run/last/model.safetensors").exists()
    other = training_file(tmp_path / "u", folder, recorded, kind="rft")
    done = CliRunner().invoke(app, ["train", str(other), "--from-experiment", "first"])
    assert done.exit_code == 1
    assert "type rft makes its own rollouts; type sft imitates the best of recorded ones" in str(done.exception)
