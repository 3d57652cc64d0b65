"""What tells a bad update from a good one."""

import math

import pytest

from millstream.pipeline.algorithms.guards import GUARDS

GOOD = {"reward": 0.9, "kl": 0.01, "entropy": 0.3, "loss": 0.1, "staleness": 0.0, "mismatch_kl": 1e-7}


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"loss": math.nan}, "loss not finite"),
        ({"grad_norm": math.inf}, "grad_norm not finite"),
        ({"kl": 3.0}, "KL is 3, above 1"),
        ({"entropy": 1e-6, "reward": 0.1}, "entropy is 1e-06, below 0.0001"),
        ({"mismatch_kl": 0.4}, "not of the version that they name"),
    ],
)
def test_a_bad_step_has_a_reason(last: dict[str, float], reason: str) -> None:
    (fault,) = [fault for guard in GUARDS if (fault := guard([GOOD, {**GOOD, **last}])) is not None]
    assert reason in fault.reason


@pytest.mark.parametrize(
    "last",
    [
        {},
        {"entropy": 0.0, "reward": 1.0},  # sure, and right
        {"mismatch_kl": 0.4, "staleness": 1.5},  # older data may differ
        {"reward": 0.0},  # one bad step is chance
    ],
)
def test_a_good_step_has_none(last: dict[str, float]) -> None:
    assert not [guard for guard in GUARDS if guard([GOOD] * 9 + [{**GOOD, **last}]) is not None]


def test_a_reward_that_stays_down_is_noticed_within_three_steps() -> None:
    steps = [{**GOOD, "reward": reward} for reward in [0.3, 0.5, 0.6, 0.7, 0.8, 0.0, 0.0, 0.0]]
    (fault,) = [fault for guard in GUARDS if (fault := guard(steps)) is not None]
    assert fault.reason == "the reward of 3 steps is 0, after 0.7"
    assert fault.gradual


def test_rewards_that_are_mostly_chance_do_not_collapse() -> None:
    assert not [guard for guard in GUARDS if guard([{**GOOD, "reward": r} for r in [0.1, 0.1, 0.1, 0, 0, 0, 0]])]
