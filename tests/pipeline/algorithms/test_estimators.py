import math
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.pipeline.algorithms.estimators import (
    Estimator,
    Turns,
    dr_grpo,
    gae,
    grpo,
    grpo_group,
    overlong_penalty,
    plain,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
    turn_rewards,
    whitened,
)

rewards = st.floats(-10, 10).map(lambda x: round(x, 3))
groups = st.lists(
    st.lists(st.dictionaries(st.integers(0, 3), rewards, max_size=4), min_size=2, max_size=5), min_size=1, max_size=4
)


def test_each_turn_keeps_its_own_reward() -> None:
    assert turn_rewards([(0, 0.5), (1, 0.0)]) == {0: 0.5, 1: 0.0}


def test_a_turn_without_a_reward_is_credited_with_the_next_one() -> None:
    assert turn_rewards([(0, None), (1, 0.25), (2, None), (3, 1.0)]) == {0: 0.25, 1: 0.25, 2: 1.0, 3: 1.0}


def test_nothing_follows_the_last_reward() -> None:
    assert turn_rewards([(0, 1.0), (1, None)]) == {0: 1.0, 1: 0.0}
    assert turn_rewards([(0, None)]) == {0: 0.0}


def test_worked_example() -> None:
    """Turn 0: mean .25, differences ±.25; turn 1: equal. Batch deviation: sqrt(2 · .25² / 4) = .25 / sqrt(2)."""
    result = grpo([[{0: 0.5, 1: 0.5}, {0: 0.0, 1: 0.5}]])
    assert result[0][0] == {0: pytest.approx(2**0.5), 1: 0.0}
    assert result[0][1] == {0: pytest.approx(-(2**0.5)), 1: 0.0}


def test_a_right_first_step_is_not_blamed_for_the_second() -> None:
    first_only, second_only = grpo([[{0: 0.5, 1: 0.0}, {0: 0.0, 1: 0.5}]])[0]
    assert first_only[0] > 0 > first_only[1]
    assert second_only[1] > 0 > second_only[0]


def test_groups_that_agree_teach_nothing() -> None:
    assert grpo([[{0: 0.5}, {0: 0.5}], [{0: 0.0}, {0: 0.0}]]) == [[{0: 0.0}, {0: 0.0}], [{0: 0.0}, {0: 0.0}]]


def test_a_small_deviation_is_not_blown_up() -> None:
    assert grpo([[{0: 0.001}, {0: -0.001}]])[0][0][0] == pytest.approx(0.001 / 0.05)


@given(groups)
def test_advantages_of_a_groups_turn_cancel_out(given_rewards: list[list[dict[int, float]]]) -> None:
    for members in grpo(given_rewards):
        for turn in {turn for member in members for turn in member}:
            assert fmean(member[turn] for member in members if turn in member) == pytest.approx(0, abs=1e-6)


@given(groups)
def test_advantages_have_unit_deviation_unless_it_is_small(given_rewards: list[list[dict[int, float]]]) -> None:
    values = [a for members in grpo(given_rewards) for member in members for a in member.values()]
    if values:
        assert pstdev(values) <= 1 + 1e-9
    unbounded = [a for ms in grpo(given_rewards, 1e-9) for member in ms for a in member.values()]
    if any(abs(value) > 1e-3 for value in unbounded):
        assert pstdev(unbounded) == pytest.approx(1)


@given(groups)
def test_a_constant_bonus_changes_nothing(given_rewards: list[list[dict[int, float]]]) -> None:
    shifted = [[{turn: reward + 5 for turn, reward in member.items()} for member in ms] for ms in given_rewards]
    for before, after in zip(grpo(given_rewards), grpo(shifted), strict=True):
        for old, new in zip(before, after, strict=True):
            assert new == pytest.approx(old, abs=1e-6)


EVERY = [grpo, grpo_group, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, plain]


@pytest.mark.parametrize("estimator", EVERY)
@given(given_rewards=groups)
def test_advantages_have_the_shape_of_the_rewards(estimator: Estimator, given_rewards: list[list[Turns]]) -> None:
    found = estimator(given_rewards)
    assert [[list(turns) for turns in members] for members in found] == [
        [list(turns) for turns in members] for members in given_rewards
    ]
    assert all(math.isfinite(value) for members in found for turns in members for value in turns.values())


@pytest.mark.parametrize("estimator", EVERY)
def test_without_groups_there_are_no_advantages(estimator: Estimator) -> None:
    assert estimator([]) == []
    assert estimator([[{}, {}]]) == [[{}, {}]]


@pytest.mark.parametrize("estimator", [grpo_group, dr_grpo, rloo])
@given(given_rewards=groups)
def test_a_group_is_compared_with_itself_alone(estimator: Estimator, given_rewards: list[list[Turns]]) -> None:
    assert estimator(given_rewards) == [estimator([members])[0] for members in given_rewards]


@pytest.mark.parametrize("estimator", [grpo, grpo_group, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline])
def test_members_that_agree_teach_nothing(estimator: Estimator) -> None:
    assert estimator([[{0: 0.5}, {0: 0.5}, {0: 0.5}]]) == [[{0: 0.0}] * 3]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Rewards 1, 0, 0, 0: mean 1/4, differences 3/4 and −1/4; Σd² = 3/4.
        (dr_grpo, (0.75, -0.25)),
        (rloo, (1.0, -1 / 3)),
        (grpo_group, (0.75 / 0.5, -0.25 / 0.5)),
        (grpo, (0.75 / (3 / 16) ** 0.5, -0.25 / (3 / 16) ** 0.5)),
        (reinforce_pp, (0.75 / 0.5, -0.25 / 0.5)),
        (plain, (1.0, 0.0)),
    ],
)
def test_worked_examples(estimator: Estimator, expected: tuple[float, float]) -> None:
    found = [turns[0] for turns in estimator([[{0: 1.0}, {0: 0.0}, {0: 0.0}, {0: 0.0}]])[0]]
    assert found == pytest.approx([expected[0]] + [expected[1]] * 3, rel=1e-5)


def test_reinforce_pp_compares_across_groups_and_its_baseline_form_does_not() -> None:
    easy_and_hard = [[{0: 1.0}, {0: 1.0}], [{0: 0.0}, {0: 0.0}]]
    assert reinforce_pp(easy_and_hard)[0][0][0] > 0.8
    assert reinforce_pp_baseline(easy_and_hard) == [[{0: 0.0}] * 2] * 2


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (20, -1.0), (21, -1.0), (400, -1.0)]
)
def test_the_overlong_penalty_grows_over_the_cache(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, limit=20, cache=4) == penalty


def test_gae_by_hand() -> None:
    """γ = .5, λ = .5. δ = (0 + .5·2 − 1, 1 + 0 − 2) = (0, −1); A = (0 + .25·−1, −1)."""
    assert gae([0.0, 1.0], [1.0, 2.0], 0.5, 0.5) == ([-0.25, -1.0], [0.75, 1.0])
    assert gae([], []) == ([], [])


@given(st.lists(st.tuples(rewards, rewards), max_size=6))
def test_gae_without_decay_is_the_return_minus_the_value(steps: list[tuple[float, float]]) -> None:
    """λ = 1 is the Monte Carlo return; λ = 0 the one-step difference."""
    given_rewards, values = [step[0] for step in steps], [step[1] for step in steps]
    _, returns = gae(given_rewards, values, 1.0, 1.0)
    assert returns == pytest.approx([sum(given_rewards[t:]) for t in range(len(steps))], abs=1e-9)
    advantages, _ = gae(given_rewards, values, 1.0, 0.0)
    following = [*values[1:], 0.0]
    assert advantages == pytest.approx(
        [r + n - v for r, n, v in zip(given_rewards, following, values, strict=False)], abs=1e-9
    )


def test_whitening() -> None:
    assert whitened([]) == []
    assert whitened([3.0]) == [0.0]
    assert whitened([1.0, 3.0]) == pytest.approx([-(0.5**0.5), 0.5**0.5])
