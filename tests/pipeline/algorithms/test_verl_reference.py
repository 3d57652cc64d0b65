"""Estimators and losses against verl 0.9.1's, as `record_verl.py` recorded them: equal to 1e-6, gradients
included. Where ours differ on purpose, the difference is tested."""

# ruff: noqa: E402 — torch comes with the `train` extra
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from millstream.pipeline.algorithms import estimators
from millstream.pipeline.algorithms.losses import (
    LOSSES,
    Tokens,
    divergence,
    importance_weights,
    token_weights,
    value_loss,
)

pytestmark = pytest.mark.torch

VERL = json.loads((Path(__file__).parent / "verl_reference.json").read_text())
GIVEN = {name: torch.tensor(values, dtype=torch.float64) for name, values in VERL["inputs"].items()}
MASK = GIVEN["mask"].bool()
AGGREGATIONS = {
    "token-mean": "token-mean",
    "seq-mean-token-mean": "sequence-mean-token-mean",
    "seq-mean-token-sum-norm": "sequence-mean-token-sum-norm",
}


def near(expected: Any) -> Any:
    return pytest.approx(torch.tensor(expected, dtype=torch.float64).flatten().tolist(), rel=1e-6, abs=1e-6)


def leaf(name: str) -> Any:
    return GIVEN[name].clone().requires_grad_()


def grouped(rewards: Sequence[float]) -> list[list[dict[int, float]]]:
    """One turn for each of the recorded rewards, in verl's groups."""
    groups: dict[int, list[dict[int, float]]] = defaultdict(list)
    for group, reward in zip(VERL["estimates"]["groups"], rewards, strict=True):
        groups[group].append({0: reward})
    return list(groups.values())


def flat(groups: Sequence[Sequence[dict[int, float]]]) -> list[float]:
    return [turns[0] for members in groups for turns in members]


@pytest.mark.parametrize("name", VERL["policy"])
def test_policy_losses(name: str) -> None:
    loss, clip, aggregation, correction = name.split("/")
    logprobs = leaf("logprobs")
    by_token, _ = LOSSES[loss](Tokens(logprobs, GIVEN["old"], GIVEN["advantages"], MASK), tuple(VERL["clips"][clip]))
    if correction == "decoupled":
        by_token = by_token * importance_weights(GIVEN["old"], GIVEN["sampled"], 2.0)
    total = (by_token * token_weights(GIVEN["mask"], AGGREGATIONS[aggregation])).sum()
    total.backward()
    assert [total.item()] == near([VERL["policy"][name]["value"]])
    assert logprobs.grad.flatten().tolist() == near(VERL["policy"][name]["gradient"])


def test_every_loss_and_aggregation_was_recorded() -> None:
    assert len(VERL["policy"]) == len(LOSSES) * len(VERL["clips"]) * len(AGGREGATIONS) * 2


def test_the_value_loss() -> None:
    values = leaf("values")
    by_token, _ = value_loss(values, GIVEN["old_values"], GIVEN["returns"], 0.2)
    total = (by_token * token_weights(GIVEN["mask"], "token-mean")).sum()
    total.backward()
    assert [total.item()] == near([VERL["value"]["value"]])
    assert values.grad.flatten().tolist() == near(VERL["value"]["gradient"])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_divergences(kind: Any) -> None:
    logprobs = leaf("logprobs")
    found = divergence(logprobs, GIVEN["reference"], kind) * GIVEN["mask"]
    found.sum().backward()
    assert found.flatten().tolist() == near(VERL["divergence"][kind]["value"])
    assert logprobs.grad.flatten().tolist() == near(VERL["divergence"][kind]["gradient"])


@pytest.mark.parametrize("name", ["grpo_group", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_estimators(name: str) -> None:
    found = flat(getattr(estimators, name)(grouped(VERL["estimates"]["rewards"])))
    assert found == near(VERL["estimates"][name])


def test_gae() -> None:
    """verl leaves out what the mask does; ours is given the other tokens alone. verl's advantages are whitened."""
    expected = VERL["estimates"]["gae"]
    advantages, returns = [], []
    for rewards, values, mask in zip(GIVEN["rewards"], GIVEN["values"], MASK, strict=True):
        found = estimators.gae(rewards[mask].tolist(), values[mask].tolist(), expected["discount"], expected["decay"])
        advantages += found[0]
        returns += found[1]
    assert estimators.whitened(advantages) == near(torch.tensor(expected["advantages"])[MASK].tolist())
    assert returns == near(torch.tensor(expected["returns"])[MASK].tolist())


def test_a_turn_counts_once_in_a_batch_and_in_verl_as_often_as_it_has_tokens() -> None:
    """The sample deviation of n turns is √(n/(n − 1)) of the batch's, that of their 3n tokens √(3n/(3n − 1))."""
    found = flat(estimators.reinforce_pp_baseline(grouped(VERL["estimates"]["rewards"])))
    n = len(found)
    factor = math.sqrt((3 * n - 1) / (3 * n) * n / (n - 1))
    expected = VERL["estimates"]["reinforce_pp_baseline_of_three_tokens"]
    assert [value * factor for value in found] == near(expected)


def test_a_lonely_turn_teaches_nothing_where_verl_keeps_its_reward() -> None:
    for estimator in (estimators.grpo, estimators.grpo_group, estimators.dr_grpo, estimators.rloo):
        assert estimator([[{0: 0.7}]]) == [[{0: 0.0}]]
