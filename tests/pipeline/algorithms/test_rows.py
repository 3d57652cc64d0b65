from typing import Any

import pytest

pytest.importorskip("torch")

from factories import AFTER_A_BREAK, CONVERSATION, finished, tokens

from millstream.pipeline.algorithms.estimators import plain, rloo
from millstream.pipeline.algorithms.rows import Overlong, rows_of, varied
from millstream.pipeline.training.groups import Group
from millstream.schemas.errors import ConfigError

pytestmark = pytest.mark.torch

ANY = tokens([2, 5], [6], [-1.0])


def test_remaining_members_are_used_and_small_groups_dropped() -> None:
    good = finished("good", [ANY | {"reward": 1.0}])
    bad = finished("bad", [ANY | {"reward": 0.0}])
    failed = finished("failed", [ANY | {"reward": 1.0}], status="failed")
    untrainable = finished("untrainable", [ANY], trainable=False, reason="span_count")
    callless = finished("callless", [])
    usable, lonely = Group("g", (good, failed, bad, untrainable, callless)), Group("h", (good, failed))
    rows, turns, dropped = rows_of([usable, lonely])
    assert (turns, dropped) == (2, 1)
    assert [row.advantages for row in rows] == [[1.0], [-1.0]]
    assert (rows[0].prompt, rows[0].response, rows[0].logprobs) == ([2, 5], [6], [-1.0])


def test_an_untrainable_turn_is_left_out() -> None:
    member = finished("r", [ANY, {"trainable": False, "reason": "tokens"}, ANY | {"reward": 1.0}])
    _, turns, dropped = rows_of([Group("g", (member, member))])
    assert (turns, dropped) == (4, 0)


def test_what_a_cut_off_answer_earned_counts_for_the_turns_before_it() -> None:
    cut = {"trainable": False, "reason": "too long"}
    members = [finished(str(earned), [ANY, cut | {"reward": earned}]) for earned in (1.0, 0.0)]
    rows, _, _ = rows_of([Group("g", tuple(members))])
    assert [row.advantages for row in rows] == [[1.0], [-1.0]]


def test_turns_that_continue_each_other_make_one_row_with_a_mask() -> None:
    rows, turns, _ = rows_of(
        [Group("g", (finished("a", CONVERSATION), finished("b", AFTER_A_BREAK)))], merge_turns=True
    )
    assert turns == 4
    assert [row.response for row in rows] == [[6, 8, 9, 3, 4], [6], [3, 4]]
    assert rows[0].rl == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert rows[0].logprobs == [-1.0, 0.0, 0.0, -2.0, -3.0]


@pytest.mark.parametrize("broken", [{"response_logprobs": None}, tokens([2], [6, 7], [-1.0])])
def test_missing_data_names_rollout_and_turn(broken: dict[str, Any]) -> None:
    group_ = Group("g", (finished("good", [ANY]), finished("broken", [ANY, ANY | broken])))
    with pytest.raises(ValueError, match="rollout broken, turn 1"):
        rows_of([group_])


def test_a_row_knows_its_rollout_and_who_made_each_turn() -> None:
    turns = [turn | {"model_version": f"run.0.{i}"} for i, turn in enumerate(CONVERSATION)]
    rows, _, _ = rows_of([Group("g", (finished("a", turns), finished("b", AFTER_A_BREAK)))], merge_turns=True)
    assert (rows[0].rollout_id, rows[0].versions) == ("a", ("run.0.0", "run.0.1"))
    assert [row.rollout_id for row in rows] == ["a", "b", "b"]


def test_what_stands_between_two_turns_has_no_weight() -> None:
    rows, _, _ = rows_of([Group("g", (finished("a", CONVERSATION), finished("b", AFTER_A_BREAK)))], merge_turns=True)
    assert rows[0].rl == rows[0].ref_kl == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert rows[0].ce == [0.0] * 5


def test_a_critic_sees_each_reward_once_at_the_last_token_of_its_turn() -> None:
    """The reward of a turn that is not trained on counts for the trainable one before it, or for none."""
    cut = {"trainable": False, "reason": "too long"}
    first = [cut | {"reward": 8.0}, CONVERSATION[0], cut | {"reward": 0.5}, CONVERSATION[1], cut | {"reward": 0.25}]
    rows, _, _ = rows_of([Group("g", (finished("a", first), finished("b", CONVERSATION)))])
    assert [row.rewards for row in rows] == [[0.5], [0.0, 1.25], [0.0], [0.0, 1.0]]


def test_the_estimator_decides_the_advantages() -> None:
    members = [finished(str(reward), [ANY | {"reward": reward}]) for reward in (1.0, 0.0, 0.5)]
    rows, _, _ = rows_of([Group("g", tuple(members))], rloo)
    assert [row.advantages for row in rows] == [[0.75], [-0.75], [0.0]]


def test_long_answers_are_punished_before_they_are_compared() -> None:
    short, long = tokens([2], [5] * 4, [-1.0] * 4), tokens([2], [5] * 7, [-1.0] * 7)
    members = [finished("short", [short | {"reward": 1.0}]), finished("long", [long | {"reward": 1.0}])]
    rows, _, _ = rows_of([Group("g", tuple(members))], plain, overlong=Overlong(limit=8, cache=4))
    assert [row.advantages[0] for row in rows] == [1.0, 0.25]
    assert [row.rewards[-1] for row in rows] == [1.0, 0.25]


@pytest.mark.parametrize(("limit", "cache"), [(8, 0), (8, 9), (0, 0), (8, -1)])
def test_an_overlong_range_that_is_none_is_refused(limit: int, cache: int) -> None:
    with pytest.raises(ConfigError, match="overlong: 0 < cache <= limit"):
        Overlong(limit, cache)


def test_a_group_is_varied_if_members_differ_at_the_same_turn() -> None:
    def group(*rewards: list[float | None], **end: Any) -> Group:
        return Group("g", tuple(finished("r", [ANY | {"reward": r} for r in turns], **end) for turns in rewards))

    assert varied(group([1.0], [0.0]))
    assert not varied(group([1.0], [1.0]))
    assert varied(group([0.0, 1.0], [1.0, 0.0]))
    assert not varied(group([None, 1.0], [1.0, 1.0]))  # a turn without a reward has the next one's
    assert not varied(group([1.0, 0.5], [1.0][:0]))
    assert not varied(group([1.0], [0.0], trainable=False))
    assert not varied(Group("g", ()))
