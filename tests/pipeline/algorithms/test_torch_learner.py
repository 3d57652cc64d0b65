# ruff: noqa: E402 — torch comes with the `train` extra
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from examples.calculator import model
from millstream.pipeline.algorithms.critic import CriticOptions
from millstream.pipeline.algorithms.losses import LOSSES, Tokens
from millstream.pipeline.algorithms.rows import Row
from millstream.pipeline.algorithms.torch_learner import TorchLearner, lr_factor
from millstream.pipeline.models.lora import LoraOptions
from millstream.pipeline.models.policy import load_model
from millstream.schemas.errors import ConfigError

pytestmark = pytest.mark.torch

PROMPT = [2, 5, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.create(path, seed=1)
    return path


def logprobs(learner: TorchLearner, response: Sequence[int]) -> list[float]:
    """Of each token of a response to `PROMPT`."""
    learner_model = load_model(learner.model).eval()
    for name, parameter in learner_model.named_parameters():
        parameter.data.copy_(learner.weights()[name])
    with torch.no_grad():
        logits = learner_model(torch.tensor([[*PROMPT, *response]])).logits[0, len(PROMPT) - 1 : -1]
    found: list[float] = torch.log_softmax(logits, -1)[range(len(response)), list(response)].tolist()
    return found


def row(response: Sequence[int], advantage: float, mu: Sequence[float], **fields: Any) -> Row:
    ones, zeros = [1.0] * len(response), [0.0] * len(response)
    given: dict[str, Any] = {
        "prompt": PROMPT,
        "response": list(response),
        "logprobs": list(mu),
        "advantages": [advantage] * len(response),
        "rewards": [*zeros[1:], advantage],
        "rl": ones,
        "ce": zeros,
        "ref_kl": ones,
    }
    return Row(**(given | fields))


def own_rows(learner: TorchLearner) -> list[Row]:
    """Rows that this policy might have sampled: two good answers, two bad ones, of different lengths."""
    answers = {(6, 7): 1.0, (8,): -1.0, (6, 9, 10): 0.5, (11, 12): -0.5}
    return [
        row(response, advantage, logprobs(learner, response), rollout_id=f"r{response}")
        for response, advantage in answers.items()
    ]


def copied(learner: TorchLearner) -> dict[str, Any]:
    return {name: weight.clone() for name, weight in learner.weights().items()}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("correction", ["bypass", "decoupled"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_makes_good_answers_likelier(folder: Path, loss: str, correction: Any) -> None:
    learner = TorchLearner(folder, loss=loss, entropy=0.0, correction=correction, epochs=1, lr=1e-3)
    rows = own_rows(learner)
    metrics = learner.learn(rows)
    assert metrics["max_ratio_error"] < 1e-4
    for each in rows:
        moved = sum(logprobs(learner, each.response)) - sum(each.logprobs)
        assert moved * each.advantages[0] > 0


@pytest.mark.parametrize("options", [{}, {"critic": CriticOptions(lr=0.0)}, {"kl": 0.1}, {"weight_decay": 0.1}])
def test_without_a_learning_rate_the_weights_stay(folder: Path, options: dict[str, Any]) -> None:
    learner = TorchLearner(folder, lr=0.0, **options)
    before = copied(learner)
    learner.learn(own_rows(learner))
    assert distance(before, copied(learner)) == 0.0


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum-norm"])
def test_microbatches_teach_the_same(folder: Path, aggregation: Any) -> None:
    """Up to rounding, which Adam's first step would blow up: the gradient's norm and the loss are compared."""
    options: dict[str, Any] = {"aggregation": aggregation, "epochs": 1, "kl": 0.1, "norm_tokens": 5}
    whole = TorchLearner(folder, **options)
    rows = [replace(each, ce=[0.5] * len(each.response)) for each in own_rows(whole)]
    rows = [replace(each, logprobs=[p - 0.1 for p in each.logprobs]) for each in rows]
    expected = whole.learn(rows)
    for microbatch in (1, 3):
        found = TorchLearner(folder, microbatch=microbatch, **options).learn(rows)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert {"ce", "ref_kl", "loss", "entropy", "kl", "clip_fraction", "grad_norm"} <= expected.keys()


def test_aggregations_weigh_long_answers_differently(folder: Path) -> None:
    rows = own_rows(TorchLearner(folder))
    norms = {
        TorchLearner(folder, aggregation=aggregation, epochs=1).learn(rows)["grad_norm"]  # type: ignore[arg-type]
        for aggregation in ("token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum-norm")
    }
    assert len(norms) == 3


def test_a_reference_holds_the_policy(folder: Path) -> None:
    free, held = (TorchLearner(folder, entropy=0.0, kl=kl, epochs=8, lr=1e-3) for kl in (0.0, 5.0))
    rows = own_rows(free)
    free.learn(rows)
    metrics = held.learn(rows)
    assert metrics["ref_kl"] > 0.0

    def moved(learner: TorchLearner) -> float:
        return sum(abs(sum(logprobs(learner, each.response)) - sum(each.logprobs)) for each in rows)

    assert moved(held) < 0.5 * moved(free)


def test_the_reference_is_another_folder_if_one_is_given(folder: Path, tmp_path: Path) -> None:
    model.create(tmp_path, seed=2)
    rows = own_rows(TorchLearner(folder))
    assert TorchLearner(folder, lr=0.0, kl=1.0).learn(rows)["ref_kl"] == pytest.approx(0.0, abs=1e-6)
    assert TorchLearner(folder, lr=0.0, kl=1.0, reference=tmp_path).learn(rows)["ref_kl"] > 1e-3


def test_a_row_with_cross_entropy_alone_is_imitated(folder: Path) -> None:
    """Supervised learning: no policy loss, no log-probabilities of another policy."""
    learner = TorchLearner(folder, entropy=0.0, epochs=4, lr=1e-3)
    before = sum(logprobs(learner, [6, 7]))
    zeros, ones = [0.0, 0.0], [1.0, 1.0]
    metrics = learner.learn([row([6, 7], 0.0, zeros, rl=zeros, ref_kl=zeros, ce=ones)])
    assert sum(logprobs(learner, [6, 7])) > before
    assert metrics["ce"] == pytest.approx(metrics["loss"])
    assert "max_ratio_error" not in metrics


def test_a_token_without_weight_is_read_and_not_learnt_from(folder: Path) -> None:
    learner = TorchLearner(folder, entropy=0.0, epochs=1)
    mu = logprobs(learner, [6, 7, 8])
    weights = [1.0, 0.0, 1.0]
    one, other = (
        TorchLearner(folder, entropy=0.0, epochs=1).learn(
            [replace(row([6, 7, 8], 1.0, mu, rl=weights, ref_kl=weights), advantages=[1.0, between, -0.5])]
        )
        for between in (0.0, 99.0)
    )
    assert one == other


def test_decoupled_is_bypass_for_data_of_these_weights_and_not_for_old_data(folder: Path) -> None:
    rows = own_rows(TorchLearner(folder))
    old_data = [replace(each, logprobs=[p - 1.0 for p in each.logprobs]) for each in rows]
    norms = {}
    for name, data in {"own": rows, "old": old_data}.items():
        for correction in ("bypass", "decoupled"):
            learner = TorchLearner(folder, entropy=0.0, epochs=1, correction=correction)  # type: ignore[arg-type]
            norms[name, correction] = learner.learn(data)
    assert norms["own", "decoupled"]["grad_norm"] == pytest.approx(norms["own", "bypass"]["grad_norm"], rel=1e-4)
    # π/μ = e: the bypass clips whatever has a positive advantage; decoupled weighs it with 2 and does not clip.
    assert norms["old", "bypass"]["clip_fraction"] > 0.0
    assert norms["old", "decoupled"]["clip_fraction"] == 0.0
    assert norms["old", "decoupled"]["loss"] == pytest.approx(2 * norms["own", "bypass"]["loss"], rel=1e-3)
    assert norms["old", "decoupled"]["max_ratio_error"] == pytest.approx(torch.e - 1, rel=1e-3)


def test_a_loss_of_ones_own_is_called_with_tokens_and_clip(folder: Path) -> None:
    seen = []

    def mine(tokens: Tokens, clip: tuple[float, float]) -> Any:
        seen.append(clip)
        return -tokens.advantages * tokens.logprobs, torch.zeros_like(tokens.logprobs)

    rows = own_rows(TorchLearner(folder))
    found = TorchLearner(folder, loss=mine, clip=(0.3, 0.4), epochs=1).learn(rows)
    assert seen == [(0.3, 0.4)]
    assert found == TorchLearner(folder, loss="reinforce", epochs=1).learn(rows)


def test_the_learning_rate_warms_up_and_falls() -> None:
    def factors(*args: Any) -> list[float]:
        return [round(lr_factor(update, *args), 3) for update in range(7)]

    assert factors("constant", 0, None) == [1.0] * 7
    assert factors("constant", 3, None) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert factors("linear", 1, 5) == [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert factors("cosine", 0, 4) == [1.0, 0.854, 0.5, 0.146, 0.0, 0.0, 0.0]


def test_an_update_reports_its_learning_rate(folder: Path) -> None:
    learner = TorchLearner(folder, lr=1e-3, schedule="linear", updates=2)
    rows = own_rows(learner)
    assert [learner.learn(rows)["lr"] for _ in range(3)] == pytest.approx([1e-3, 5e-4, 0.0])


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosine", "updates": 5, "warmup": 1},
        {"critic": CriticOptions()},
        {"weight_decay": 0.1},
        {"kl": 0.1, "correction": "decoupled"},
    ],
    ids=["schedule", "critic", "weight_decay", "reference"],
)
def test_going_on_from_a_state_is_exact(folder: Path, options: dict[str, Any]) -> None:
    straight, stopped, resumed = (TorchLearner(folder, minibatch=3, seed=5, **options) for _ in range(3))
    rows = own_rows(straight)
    straight.learn(rows)
    stopped.learn(rows)
    resumed.load_state(stopped.state())
    assert resumed.learn(rows) == straight.learn(rows)
    assert distance(copied(straight), copied(resumed)) == 0.0


def test_bfloat16_evaluates_in_it_and_keeps_float32_weights(folder: Path) -> None:
    half = TorchLearner(folder, dtype="bfloat16", entropy=0.0, lr=1e-3)
    rows = own_rows(half)
    metrics = half.learn(rows)
    assert {weight.dtype for weight in half.weights().values()} == {torch.float32}
    assert 1e-4 < metrics["max_ratio_error"] < 0.2  # μ is of float32
    assert sum(logprobs(half, [6, 7])) > sum(rows[0].logprobs)


def test_a_critic_learns_values_and_replaces_the_advantages(folder: Path) -> None:
    learner = TorchLearner(folder, critic=CriticOptions(lr=3e-3), entropy=0.0, epochs=4, lr=1e-4)
    rows = [replace(each, advantages=[float("nan")] * len(each.response)) for each in own_rows(learner)]
    found = [learner.learn(rows) for _ in range(6)]
    # Answers that begin alike have values alike until they part: .34 is all that can be explained.
    assert found[0]["value_explained"] < 0.05 < 0.3 < found[-1]["value_explained"]
    assert found[-1]["value_loss"] < 0.75 * found[0]["value_loss"]


def test_a_critic_carries_a_reward_back_to_earlier_rows_of_its_rollout(folder: Path) -> None:
    """Two turns as two rows: the first earns nothing itself."""

    def prepared(reward: float) -> Any:
        learner = TorchLearner(folder, critic=CriticOptions(), entropy=0.0, epochs=1)
        assert learner._critic is not None
        mu = logprobs(learner, [6, 7])
        first = row([6, 7], 0.0, mu, rollout_id="a", rewards=[0.0, 0.0])
        last = row([6, 7], 0.0, mu, rollout_id="a", rewards=[0.0, reward])
        other = row([8, 9], 0.0, logprobs(learner, [8, 9]), rollout_id="b", rewards=[0.0, 0.0])
        return [each.advantages for each in learner._critic.prepare([first, last, other], 8)]

    first, last, other = prepared(1.0)
    assert last[1] > last[0] > first[1] > first[0] > max(other)
    assert sum(map(sum, (first, last, other))) == pytest.approx(0.0, abs=1e-6)


def test_adapters_are_trained_alone_and_merged_into_plain_weights(folder: Path) -> None:
    pytest.importorskip("peft")
    learner = TorchLearner(folder, lora=LoraOptions(rank=4), entropy=0.0, lr=1e-2)
    before = copied(learner)
    plain = TorchLearner(folder)
    assert distance(before, copied(plain)) == 0.0
    rows = own_rows(learner)
    learner.learn(rows)
    after = copied(learner)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert sum(logprobs(learner, [6, 7])) > sum(rows[0].logprobs)
    # The merged weights are the policy that is trained.
    assert learner.learn(own_rows(learner))["max_ratio_error"] < 1e-4


def test_adapters_go_on_from_a_state_exactly(folder: Path) -> None:
    pytest.importorskip("peft")
    straight, stopped, resumed = (
        TorchLearner(folder, lora=LoraOptions(rank=4), seed=seed, lr=1e-2) for seed in (1, 1, 2)
    )
    rows = own_rows(straight)
    straight.learn(rows)
    stopped.learn(rows)
    resumed.load_state(stopped.state())
    assert distance(copied(straight), copied(resumed)) == 0.0
    resumed._random.set_state(straight._random.get_state())
    assert resumed.learn(rows) == straight.learn(rows)
    with pytest.raises(ConfigError, match="its lora options were others"):
        TorchLearner(folder, lora=LoraOptions(rank=8)).load_state(stopped.state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "gpso"}, "unknown loss 'gpso': one of ppo, gspo, cispo, reinforce"),
        ({"schedule": "linear"}, "give their number"),
        ({"kl": 0.1, "divergence": "k1"}, "holds nothing"),
        ({"device": "toaster"}, "device 'toaster'"),
        ({"kl": 0.1, "reference": "/nowhere"}, "/nowhere is not a Hugging Face model folder"),
    ],
)
def test_wrong_options_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchLearner(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_missing_device_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device 'cuda'"):
        TorchLearner(folder, device="cuda")


@pytest.mark.parametrize("make", [lambda: None, CriticOptions])
def test_a_state_of_another_kind_of_learner_is_refused(folder: Path, make: Callable[[], Any]) -> None:
    learner = TorchLearner(folder, critic=make())
    other = TorchLearner(folder, critic=None if make() else CriticOptions())
    with pytest.raises(ConfigError, match=r"the checkpoint was made with(out)? critic"):
        learner.load_state(other.state())


def test_learning_from_no_rows_changes_nothing(folder: Path) -> None:
    learner = TorchLearner(folder)
    before = copied(learner)
    assert learner.learn([]) == {}
    assert distance(before, copied(learner)) == 0.0
