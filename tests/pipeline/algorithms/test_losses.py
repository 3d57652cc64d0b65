# ruff: noqa: E402 — torch comes with the `train` extra
import math

import pytest

torch = pytest.importorskip("torch")

from millstream.pipeline.algorithms.losses import entropy, kl, policy_loss

pytestmark = pytest.mark.torch


def test_policy_loss_holds_back_only_what_leaves_the_clip_range() -> None:
    log_ratio = torch.tensor([0.5, 2.0, 0.5, 2.0, 1.1]).log()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    loss, clipped = policy_loss(log_ratio, advantage, (0.2, 0.28))
    # min(ρA, clip(ρ)A): .5, 1.28, −.8, −2, 2.2
    assert loss.item() == pytest.approx(-(0.5 + 1.28 - 0.8 - 2.0 + 2.2) / 5)
    assert clipped.item() == pytest.approx(2 / 5)


def test_entropy_of_a_uniform_and_of_a_certain_choice() -> None:
    logprobs = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]).clamp(min=1e-12).log()
    assert entropy(logprobs).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)


def test_kl_is_zero_for_equal_policies_and_positive_otherwise() -> None:
    assert kl(torch.zeros(3)).item() == 0.0
    # mean(ρ − 1 − ln ρ); ln 0.5 + ln 2 = 0
    assert kl(torch.tensor([0.5, 2.0]).log()).item() == pytest.approx((0.5 + 2.0 - 2) / 2)
