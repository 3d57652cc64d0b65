from typing import Any

import pytest

pytest.importorskip("torch")

from factories import AFTER_A_BREAK, CONVERSATION, finished, tokens

from millstream.pipeline.algorithms.samples import samples_of
from millstream.pipeline.training.groups import Group

pytestmark = pytest.mark.torch

ANY = tokens([2, 5], [6], [-1.0])


def test_remaining_members_are_used_and_small_groups_dropped() -> None:
    good = finished("good", [ANY | {"reward": 1.0}])
    bad = finished("bad", [ANY | {"reward": 0.0}])
    failed = finished("failed", [ANY | {"reward": 1.0}], status="failed")
    untrainable = finished("untrainable", [ANY], trainable=False, reason="span_count")
    callless = finished("callless", [])
    usable, lonely = Group("g", (good, failed, bad, untrainable, callless)), Group("h", (good, failed))
    samples, turns, dropped = samples_of([usable, lonely])
    assert (turns, dropped) == (2, 1)
    assert [sample.advantages for sample in samples] == [[1.0], [-1.0]]
    assert (samples[0].prompt, samples[0].response, samples[0].logprobs) == ([2, 5], [6], [-1.0])


def test_an_untrainable_turn_is_left_out() -> None:
    member = finished("r", [ANY, {"trainable": False, "reason": "tokens"}, ANY | {"reward": 1.0}])
    _, turns, dropped = samples_of([Group("g", (member, member))])
    assert (turns, dropped) == (4, 0)


def test_what_a_cut_off_answer_earned_counts_for_the_turns_before_it() -> None:
    cut = {"trainable": False, "reason": "too long"}
    members = [finished(str(earned), [ANY, cut | {"reward": earned}]) for earned in (1.0, 0.0)]
    samples, _, _ = samples_of([Group("g", tuple(members))])
    assert [sample.advantages for sample in samples] == [[1.0], [-1.0]]


def test_turns_that_continue_each_other_make_one_row_with_a_mask() -> None:
    samples, turns, _ = samples_of([Group("g", (finished("a", CONVERSATION), finished("b", AFTER_A_BREAK)))], True)
    assert turns == 4
    assert [sample.response for sample in samples] == [[6, 8, 9, 3, 4], [6], [3, 4]]
    assert samples[0].mask == [True, False, False, True, True]
    assert samples[0].logprobs == [-1.0, 0.0, 0.0, -2.0, -3.0]


@pytest.mark.parametrize("broken", [{"response_logprobs": None}, tokens([2], [6, 7], [-1.0])])
def test_missing_data_names_rollout_and_turn(broken: dict[str, Any]) -> None:
    group_ = Group("g", (finished("good", [ANY]), finished("broken", [ANY, ANY | broken])))
    with pytest.raises(ValueError, match="rollout broken, turn 1"):
        samples_of([group_])
