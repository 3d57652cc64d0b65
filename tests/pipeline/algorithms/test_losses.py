# ruff: noqa: E402 — torch comes with the `train` extra
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from millstream.pipeline.algorithms.losses import (
    Tokens,
    cispo,
    divergence,
    entropy,
    gspo,
    importance_weights,
    kl,
    ppo_clip,
    reinforce,
    token_weights,
    value_loss,
)

pytestmark = pytest.mark.torch


def tokens(ratios: list[list[float]], advantages: list[list[float]], mask: Any = None) -> Tokens:
    """Tokens of these ratios, whose old log-probabilities are −1."""
    old = -torch.ones(len(ratios), len(ratios[0]))
    logprobs = (torch.tensor(ratios).log() + old).requires_grad_()
    kept = torch.ones_like(old, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return Tokens(logprobs, old, torch.tensor(advantages), kept)


def test_ppo_holds_back_only_what_leaves_the_clip_range() -> None:
    given = tokens([[0.5, 2.0, 0.5, 2.0, 1.1]], [[1.0, 1.0, -1.0, -1.0, 2.0]])
    loss, clipped = ppo_clip(given, (0.2, 0.28))
    # min(ρA, clip(ρ)A): .5, 1.28, −.8, −2, 2.2
    assert (-loss[0]).tolist() == pytest.approx([0.5, 1.28, -0.8, -2.0, 2.2])
    assert clipped[0].tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_gspo_gives_all_tokens_of_a_row_the_geometric_mean_of_their_ratios() -> None:
    given = tokens([[2.0, 0.5, 4.0], [8.0, 9.0, 1.0]], [[1.0] * 3, [1.0] * 3], [[True] * 3, [True, False, False]])
    loss, clipped = gspo(given, (0.2, 10.0))
    assert (-loss[0]).tolist() == pytest.approx([4 ** (1 / 3)] * 3)
    assert loss[1][0].item() == pytest.approx(-8.0)
    assert not clipped.any()


def test_cispo_bounds_a_weight_and_silences_no_token() -> None:
    given = tokens([[5.0, 0.1, 1.1]], [[1.0, -1.0, 2.0]])
    loss, clipped = cispo(given, (1.0, 0.28))
    loss.sum().backward()
    assert given.logprobs.grad is not None
    assert (-given.logprobs.grad[0]).tolist() == pytest.approx([1.28, -0.1, 2.2])
    assert clipped[0].tolist() == [1.0, 0.0, 0.0]
    held = tokens([[5.0]], [[1.0]])
    ppo_clip(held, (1.0, 0.28))[0].sum().backward()
    assert held.logprobs.grad is not None
    assert held.logprobs.grad.item() == 0.0


def test_reinforce_looks_at_no_ratio() -> None:
    given = tokens([[5.0, 0.1]], [[1.0, -2.0]])
    reinforce(given, (0.2, 0.2))[0].sum().backward()
    assert given.logprobs.grad is not None
    assert given.logprobs.grad.tolist() == [[-1.0, 2.0]]


def test_how_tokens_are_averaged() -> None:
    weights = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0] * 4])
    assert token_weights(weights, "token-mean").sum(-1).tolist() == pytest.approx([3 / 4, 1 / 4, 0])
    by_row = token_weights(weights, "sequence-mean-token-mean")
    assert by_row[:, 3].tolist() == pytest.approx([1 / 6, 1 / 2, 0])
    assert token_weights(weights, "sequence-mean-token-sum-norm", 10)[:, 3].tolist() == pytest.approx([0.05, 0.05, 0])
    assert token_weights(weights, "sequence-mean-token-sum-norm")[:, 3].tolist() == pytest.approx([1 / 8, 1 / 8, 0])
    for aggregation in ("token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum-norm"):
        assert token_weights(torch.zeros(2, 3), aggregation).tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match="unknown aggregation 'mean': one of token-mean, "):
        token_weights(weights, "mean")  # type: ignore[arg-type]


def test_a_tokens_weight_scales_its_share() -> None:
    shares = token_weights(torch.tensor([[1.0, 3.0]]), "token-mean")
    assert shares.tolist() == [[0.25, 0.75]]


def test_importance_weights_are_truncated_and_1_where_the_old_policy_sampled() -> None:
    old, sampled = torch.tensor([-1.0, -1.0, -1.0, 0.0]), torch.tensor([-1.0, -1.5, -9.0, -1e30])
    weights = importance_weights(old.requires_grad_(), sampled, 2.0)
    assert weights.tolist() == pytest.approx([1.0, math.exp(0.5), 2.0, 2.0])
    assert not weights.requires_grad


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_divergence_is_that_of_the_distributions_on_average(kind: Any) -> None:
    """Policy (.5, .5), reference (.6, .4): estimates weighted with their probabilities. k2 is an approximation."""
    policy, reference = torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4])
    expected = float((policy * (policy / reference).log()).sum())
    found = float((policy * divergence(policy.log(), reference.log(), kind)).sum())
    assert found == pytest.approx(expected, rel=0.05 if kind == "k2" else 1e-5)


@pytest.mark.parametrize(("kind", "pulls"), [("k1", False), ("k2", True), ("k3", True)])
def test_which_divergence_pulls_to_the_reference(kind: Any, pulls: bool) -> None:
    """The expected gradient by the logit of token 0: that of KL(π ‖ reference) for k2, and 0 for k1."""
    logits = torch.tensor([0.0, 0.0], requires_grad=True)
    logprobs = torch.log_softmax(logits, -1)
    reference = torch.tensor([0.6, 0.4]).log()
    (logprobs.exp().detach() * divergence(logprobs, reference, kind)).sum().backward()
    assert logits.grad is not None
    if pulls:
        assert logits.grad[0].item() < -0.05
    else:
        assert logits.grad[0].item() == pytest.approx(0.0, abs=1e-7)


def test_a_token_that_the_reference_excludes_counts_within_bounds() -> None:
    assert divergence(torch.tensor([-1e4]), torch.tensor([0.0]), "k3").item() == 10.0
    assert math.isfinite(divergence(torch.tensor([0.0]), torch.tensor([-1e30]), "k3").item())


def test_a_value_moves_only_within_its_clip() -> None:
    loss, clipped = value_loss(torch.tensor([1.5, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 1.0]), 0.2)
    assert loss.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 0.9**2])
    assert clipped.tolist() == [1.0, 0.0]


def test_entropy_of_a_uniform_and_of_a_certain_choice() -> None:
    logprobs = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]).clamp(min=1e-12).log()
    assert entropy(logprobs).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)


def test_kl_is_zero_for_equal_policies_and_positive_otherwise() -> None:
    assert kl(torch.zeros(3)).tolist() == [0.0] * 3
    # ρ − 1 − ln ρ
    assert kl(torch.tensor([0.5, 2.0]).log()).tolist() == pytest.approx([math.log(2) - 0.5, 1 - math.log(2)])
