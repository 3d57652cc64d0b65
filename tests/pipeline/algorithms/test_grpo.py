# ruff: noqa: E402 — torch comes with the `train` extra
import asyncio
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from factories import AFTER_A_BREAK, CONVERSATION, finished, tokens

from examples.calculator import model
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.models.engine import Engine
from millstream.pipeline.training.groups import Group
from millstream.schemas.errors import ConfigError

pytestmark = pytest.mark.torch

QUESTION = [{"role": "user", "content": "add 3 to 8 ?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.create(path, seed=1)
    return path


async def sampled(folder: Path, count: int, max_tokens: int = 1, weights: Any = None) -> list[dict[str, Any]]:
    """Answers of the engine as triplet fields, rewarded in turns with 0 and 1."""
    engine = Engine(folder, seed=3)
    try:
        if weights is not None:
            engine.load(weights, "later")
        request = {"messages": QUESTION, "max_tokens": max_tokens, "logprobs": True, "return_token_ids": True}
        answers = await asyncio.gather(*(engine.chat(request) for _ in range(count)))
    finally:
        await engine.close()
    found = []
    for i, answer in enumerate(answers):
        choice = answer.body["choices"][0]
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        found.append(tokens(answer.body["prompt_token_ids"], choice["token_ids"], logprobs) | {"reward": float(i % 2)})
    return found


def copied(algorithm: TorchLearner) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in algorithm.weights().items()}


def group(turns: Sequence[dict[str, Any]]) -> Group:
    return Group("g", tuple(finished(f"r{i}", [turn]) for i, turn in enumerate(turns)))


@pytest.mark.parametrize("max_tokens", [1, 5])
async def test_the_engines_logprobs_are_the_algorithms_own(folder: Path, max_tokens: int) -> None:
    turns = await sampled(folder, 16, max_tokens)
    metrics = TorchLearner(folder).update([group(turns)])
    assert metrics["turns"] == 16
    assert metrics["max_ratio_error"] < 1e-4


async def test_a_wrong_token_shows_in_the_ratio(folder: Path) -> None:
    turns = await sampled(folder, 8)
    turns[0]["response_token_ids"] = struct.pack("<i", struct.unpack("<i", turns[0]["response_token_ids"])[0] ^ 1)
    assert TorchLearner(folder).update([group(turns)])["max_ratio_error"] > 1e-3


async def test_a_rewarded_answer_becomes_more_likely(folder: Path) -> None:
    add, other = 6, 7
    turns = await sampled(folder, 8)
    base = TorchLearner(folder, entropy=0.0)
    prompt = list(struct.unpack(f"<{len(turns[0]['prompt_token_ids']) // 4}i", turns[0]["prompt_token_ids"]))

    def logprob(algorithm: TorchLearner, token: int) -> float:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            return float(torch.log_softmax(algorithm._model(ids).logits[0, -1], -1)[token])

    before = logprob(base, add), logprob(base, other)
    answers = [
        tokens(prompt, [add], [before[0]]) | {"reward": 1.0},
        tokens(prompt, [other], [before[1]]) | {"reward": 0.0},
    ]
    base.update([group(answers * 4)])
    assert logprob(base, add) > before[0]
    assert logprob(base, other) < before[1]


async def test_without_a_learning_rate_the_weights_stay(folder: Path) -> None:
    algorithm = TorchLearner(folder, lr=0.0)
    before = {name: tensor.clone() for name, tensor in algorithm.weights().items()}
    algorithm.update([group(await sampled(folder, 8))])
    assert all(torch.equal(before[name], tensor) for name, tensor in algorithm.weights().items())


async def test_its_weights_fit_the_engine(folder: Path) -> None:
    algorithm = TorchLearner(folder)
    algorithm.update([group(await sampled(folder, 8))])
    later = await sampled(folder, 8, weights=algorithm.weights())
    assert algorithm.update([group(later)])["max_ratio_error"] < 1e-4


async def test_going_on_from_a_state_is_exact(folder: Path) -> None:
    batches = [group(await sampled(folder, 8)), group(await sampled(folder, 8, 3))]
    straight, stopped, resumed = (TorchLearner(folder, minibatch=3, seed=5) for _ in range(3))
    straight.update(batches[:1])
    stopped.update(batches[:1])
    resumed.load_state(stopped.state())
    expected, found = straight.update(batches[1:]), resumed.update(batches[1:])
    assert found == expected
    assert all(torch.equal(straight.weights()[name], tensor) for name, tensor in resumed.weights().items())


def test_merged_turns_teach_the_same(folder: Path) -> None:
    groups = [Group("g", (finished("a", CONVERSATION), finished("b", AFTER_A_BREAK)))]
    apart, merged = TorchLearner(folder), TorchLearner(folder, merge_turns=True)
    before, one, other = copied(apart), apart.update(groups), merged.update(groups)
    assert (one["rows"], other["rows"]) == (4, 3)
    for name in ("loss", "entropy", "kl", "grad_norm"):
        assert other[name] == pytest.approx(one[name], rel=1e-3)
    moved = max(float((after - before[name]).abs().max()) for name, after in apart.weights().items())
    differ = max(float((after - merged.weights()[name]).abs().max()) for name, after in apart.weights().items())
    assert differ < 0.05 * moved


def test_a_step_without_any_data_changes_nothing(folder: Path) -> None:
    metrics = TorchLearner(folder).update([Group("g", (finished("r", [tokens([2, 5], [6], [-1.0])]),))])
    assert metrics == {"dropped_groups": 1.0, "dropped_members": 0.0, "turns": 0.0, "rows": 0.0}


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        TorchLearner(tmp_path)


GOOD = tokens([2, 5], [6, 7], [-1.0, -2.0])
POISON = {
    "above the vocabulary": (tokens([2], [10**6], [-1.0]), "token id 1000000 is none of the model's"),
    "in the prompt": (tokens([2**31 - 1], [3], [-1.0]), "token id 2147483647 is none of the model's"),
    "below 0": (tokens([2], [-1], [-1.0]), "a token id of the response is below 0"),
    "nan": (tokens([2], [3], [float("nan")]), "a logprob is not finite"),
    "-inf": (tokens([2], [3], [float("-inf")]), "a logprob is not finite"),
    "above 0": (tokens([2], [3], [5.0]), "a logprob is 5, above 0"),
    "reward": (GOOD | {"reward": 1e308}, "its reward is 1e+308"),
    "reward nan": (GOOD | {"reward": float("nan")}, "its reward is nan"),
    "no logprobs": (GOOD | {"response_logprobs": None}, "needs prompt tokens"),
    "half a number": (GOOD | {"prompt_token_ids": b"\1\0\0\0\1"}, "end within a number"),
}


@pytest.mark.parametrize("name", POISON)
def test_a_member_that_cannot_be_learnt_from_is_dropped_with_its_reason(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A4: it ends no trainer, and the others of its group are learnt from."""
    turn, why = POISON[name]
    algorithm = TorchLearner(folder, lr=1e-2)
    before = copied(algorithm)
    good = [GOOD | {"reward": float(i % 2)} for i in range(4)]
    metrics = algorithm.update([group([turn, *good])])
    assert (metrics["dropped_members"], metrics["turns"]) == (1.0, 4.0)
    assert any(not torch.equal(before[n], weight) for n, weight in algorithm.weights().items())
    assert all(torch.isfinite(weight).all() for weight in algorithm.weights().values())
    assert "rollout r0 is not trained on: turn 0: " in caplog.text
    assert why in caplog.text


def test_a_log_probability_of_another_model_is_clipped(folder: Path) -> None:
    """A4: a finite one, however small, makes no gradient infinite."""
    algorithm = TorchLearner(folder, lr=1e-2)
    far = [tokens([2], [3], [-3e38]) | {"reward": 0.0}, GOOD | {"reward": 1.0}]
    metrics = algorithm.update([group(far)])
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    assert all(torch.isfinite(weight).all() for weight in algorithm.weights().values())
