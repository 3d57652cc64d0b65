from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.pipeline.algorithms.advantages import advantages, turn_rewards

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
    result = advantages([[{0: 0.5, 1: 0.5}, {0: 0.0, 1: 0.5}]])
    assert result[0][0] == {0: pytest.approx(2**0.5), 1: 0.0}
    assert result[0][1] == {0: pytest.approx(-(2**0.5)), 1: 0.0}


def test_a_right_first_step_is_not_blamed_for_the_second() -> None:
    first_only, second_only = advantages([[{0: 0.5, 1: 0.0}, {0: 0.0, 1: 0.5}]])[0]
    assert first_only[0] > 0 > first_only[1]
    assert second_only[1] > 0 > second_only[0]


def test_groups_that_agree_teach_nothing() -> None:
    assert advantages([[{0: 0.5}, {0: 0.5}], [{0: 0.0}, {0: 0.0}]]) == [[{0: 0.0}, {0: 0.0}], [{0: 0.0}, {0: 0.0}]]


def test_a_small_deviation_is_not_blown_up() -> None:
    assert advantages([[{0: 0.001}, {0: -0.001}]])[0][0][0] == pytest.approx(0.001 / 0.05)


@given(groups)
def test_advantages_of_a_groups_turn_cancel_out(given_rewards: list[list[dict[int, float]]]) -> None:
    for members in advantages(given_rewards):
        for turn in {turn for member in members for turn in member}:
            assert fmean(member[turn] for member in members if turn in member) == pytest.approx(0, abs=1e-6)


@given(groups)
def test_advantages_have_unit_deviation_unless_it_is_small(given_rewards: list[list[dict[int, float]]]) -> None:
    values = [a for members in advantages(given_rewards) for member in members for a in member.values()]
    if values:
        assert pstdev(values) <= 1 + 1e-9
    unbounded = [a for ms in advantages(given_rewards, 1e-9) for member in ms for a in member.values()]
    if any(abs(value) > 1e-3 for value in unbounded):
        assert pstdev(unbounded) == pytest.approx(1)


@given(groups)
def test_a_constant_bonus_changes_nothing(given_rewards: list[list[dict[int, float]]]) -> None:
    shifted = [[{turn: reward + 5 for turn, reward in member.items()} for member in ms] for ms in given_rewards]
    for before, after in zip(advantages(given_rewards), advantages(shifted), strict=True):
        for old, new in zip(before, after, strict=True):
            assert new == pytest.approx(old, abs=1e-6)
