"""The contract with verl's replay buffer, without verl: keys, fields, tags, advantages."""

from typing import Any

import pytest
from factories import AFTER_A_BREAK, CONVERSATION, finished, tokens

from millstream.pipeline.algorithms.estimators import grpo
from millstream.pipeline.algorithms.verl.rows import (
    GroupRows,
    RowRules,
    asked_with,
    rollouts_of,
    rows_of,
    token_advantages,
    uid_of,
)
from millstream.pipeline.training.groups import FinishedRollout, Group, Lineage

LINEAGE = Lineage("run", step=4)
TURN = tokens([2, 5], [6, 7], [-1.0, -2.0]) | {"model_version": "run.0.3"}
PER_TOKEN = ("response_mask", "loss_mask", "rollout_log_probs", "rm_scores")


def rows(*members: FinishedRollout, **rules: Any) -> GroupRows:
    return rows_of(Group("g", members), "a1-4-0", 5, LINEAGE, RowRules(vocabulary=100, **rules))


def with_version(turns: list[dict[str, Any]], *versions: str) -> list[dict[str, Any]]:
    return [turn | {"model_version": version} for turn, version in zip(turns, versions, strict=True)]


def two(**fields: Any) -> GroupRows:
    """Rows of two members of two turns each. The first has earned 1 in each turn, the second 0."""
    return rows(*(finished(str(r), [TURN | {"reward": r}, TURN | {"reward": r}]) for r in (1.0, 0.0)), **fields)


def test_a_row_per_turn_if_turns_do_not_continue_each_other() -> None:
    found = two()
    assert [row.key for row in found.rows] == ["a1-4-0_0_0", "a1-4-0_0_1", "a1-4-0_1_0", "a1-4-0_1_1"]
    assert [row.fields["session_id"] for row in found.rows] == [0, 0, 1, 1]
    assert [row.fields["num_turns"] for row in found.rows] == [2, 2, 2, 2]
    assert {row.fields["uid"] for row in found.rows} == {"a1-4-0"}


def test_a_batch_names_its_rollouts_once() -> None:
    found = two().rows
    keys, tags = [row.key for row in found], [row.tag for row in found]
    padding = {**tags[0], "is_padding": True, "rollout_id": "none"}
    assert rollouts_of([*keys, keys[0]], [*tags, padding]) == {"a1-4-0": ["0.0", "1.0"]}


def test_a_row_holds_what_the_model_server_has_sampled() -> None:
    row = two().rows[0]
    assert (row.fields["prompts"], row.fields["responses"]) == ([2, 5], [6, 7])
    assert row.fields["input_ids"] == [2, 5, 6, 7]
    assert row.fields["position_ids"] == [0, 1, 2, 3]
    assert row.fields["rollout_log_probs"] == [-1.0, -2.0]
    assert row.fields["response_mask"] == [1, 1]
    assert row.fields["rm_scores"] == [0.0, 1.0]


@pytest.mark.parametrize("merge_turns", [True, False])
def test_every_row_has_what_verl_reads_in_the_lengths_of_its_tags(merge_turns: bool) -> None:
    merged = [with_version(turns, "run.0.3", "run.0.4") for turns in (CONVERSATION, AFTER_A_BREAK)]
    found = rows(*(finished(str(n), turns) for n, turns in enumerate(merged)), merge_turns=merge_turns)
    assert found.rows
    for row in found.rows:
        tag = row.tag
        assert tag["status"] == "success"
        assert len(row.fields["prompts"]) == tag["prompt_len"] > 0
        assert len(row.fields["responses"]) == tag["response_len"] > 0
        assert len(row.fields["input_ids"]) == len(row.fields["position_ids"]) == tag["seq_len"]
        assert tag["seq_len"] == tag["prompt_len"] + tag["response_len"]
        assert {len(row.fields[name]) for name in PER_TOKEN} == {tag["response_len"]}
        assert tag["global_steps"] == row.fields["global_steps"] == 5
        assert all(0 <= start < stop <= tag["response_len"] for _, start, stop, _ in tag["credit"])
        learnt = sum(stop - start for _, start, stop, _ in tag["credit"])
        assert sum(row.fields["response_mask"]) == learnt


def test_turns_that_continue_each_other_make_one_row() -> None:
    talk = with_version(CONVERSATION, "run.0.3", "run.0.4")
    talk = [talk[0] | {"reward": 0.25}, talk[1] | {"reward": 1.0}]
    row = rows(*[finished(name, talk) for name in "ab"]).rows[0]
    assert row.fields["responses"] == [6, 8, 9, 3, 4]
    assert row.fields["response_mask"] == [1, 0, 0, 1, 1]
    assert row.fields["rollout_log_probs"] == [-1.0, 0.0, 0.0, -2.0, -3.0]
    assert row.fields["rm_scores"] == [0.25, 0.0, 0.0, 0.0, 1.0]
    assert row.tag["credit"] == [[0, 0, 1, 0.25], [1, 3, 5, 1.0]]
    assert (row.tag["min_global_steps"], row.tag["max_global_steps"]) == (3, 4)


def test_a_row_says_between_which_versions_it_was_made() -> None:
    turns = with_version([TURN, TURN], "run.0.4", "run.0.3")
    tags = [row.tag for row in rows(finished("a", turns), finished("b", turns)).rows[:2]]
    assert [(tag["min_global_steps"], tag["max_global_steps"]) for tag in tags] == [(4, 4), (3, 3)]


def test_the_last_reward_counts_for_the_turns_before_it() -> None:
    found = rows(*(finished(str(r), [TURN, TURN | {"reward": r}]) for r in (1.0, 0.0)))
    assert [row.tag["credit"][0][3] for row in found.rows] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (finished("bad", [TURN], status="failed"), "failed"),
        (finished("bad", [TURN], trainable=False, reason="span_count"), "span_count"),
        (finished("bad", []), "none of its turns"),
        (finished("bad", [TURN | {"trainable": False}]), "none of its turns"),
        (finished("bad", [TURN | {"response_logprobs": None}]), "turn 0: it needs prompt tokens"),
        (finished("bad", [TURN, TURN | {"prompt_token_ids": b""}]), "turn 1: it needs prompt tokens"),
        (finished("bad", [TURN | tokens([2], [6, 7], [-1.0])]), "turn 0: it needs prompt tokens"),
        (finished("bad", [TURN | tokens([2], [100], [-1.0])]), "token id 100"),
        (finished("bad", [TURN | tokens([2], [6], [float("nan")])]), "not finite"),
        (finished("bad", [TURN | {"reward": float("inf")}]), "reward is inf"),
        (finished("bad", [TURN | {"model_version": "mixed"}]), "the model server did not say at which tokens"),
        (finished("bad", [TURN | {"model_version": "run.0.5"}]), "newer than the trainer's run.0.4"),
        (finished("bad", [TURN | {"model_version": None}]), "which is none of run run"),
        (finished("bad", [TURN | {"response_versions": '[[0,"run.0.3"],[1,"run.0.5"]]'}]), "tokens 1 to 1: made by"),
    ],
)
def test_a_member_that_cannot_be_trained_on_is_left_out_with_the_reason(bad: FinishedRollout, reason: str) -> None:
    good = [finished(name, [TURN]) for name in "ab"]
    found = rows(good[0], bad, good[1])
    assert [row.key for row in found.rows] == ["a1-4-0_0_0", "a1-4-0_2_0"]
    (why,) = found.reasons
    assert why.startswith("rollout bad: ")
    assert reason in why


@pytest.mark.parametrize(("least", "kept"), [(1, 1), (2, 0)])
def test_a_group_with_too_few_members_has_no_rows(least: int, kept: int) -> None:
    found = rows(finished("good", [TURN]), finished("bad", [], status="timeout"), least=least)
    assert len(found.rows) == kept
    assert found.reasons == ("rollout bad: timeout",)


def test_each_token_gets_the_advantage_of_its_turn() -> None:
    """A right first step isn't blamed for a wrong second one, also where both are one row."""
    earned = {"a": (1.0, 0.0), "b": (0.0, 0.0)}
    members = [
        finished(
            name,
            [
                turn | {"reward": r}
                for turn, r in zip(with_version(CONVERSATION, "run.0.3", "run.0.3"), rs, strict=True)
            ],
        )
        for name, rs in earned.items()
    ]
    found = rows(*members).rows
    values = token_advantages([row.key for row in found], [row.tag for row in found], grpo)
    first = grpo([[{0: 1.0, 1: 0.0}, {0: 0.0, 1: 0.0}]])[0][0][0]
    assert first > 0
    assert values == [[first, 0.0, 0.0, 0.0, 0.0], [-first, 0.0, 0.0, 0.0, 0.0]]


def test_advantages_do_not_depend_on_the_order_of_rows() -> None:
    found = two().rows
    forth = token_advantages([row.key for row in found], [row.tag for row in found], grpo)
    back = token_advantages([row.key for row in found[::-1]], [row.tag for row in found[::-1]], grpo)
    assert forth == back[::-1] == [[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]]


def test_groups_are_compared_with_themselves() -> None:
    members = [finished(str(r), [TURN | {"reward": r}]) for r in (1.0, 0.0)]
    better = [finished(str(r), [TURN | {"reward": r}]) for r in (11.0, 10.0)]
    rules = RowRules(vocabulary=100)
    found = [
        row
        for uid, of in (("a-4-0", members), ("a-4-1", better))
        for row in rows_of(Group(uid, tuple(of)), uid, 4, LINEAGE, rules).rows
    ]
    values = token_advantages([row.key for row in found], [row.tag for row in found], grpo)
    assert [row[0] for row in values] == [1.0, -1.0, 1.0, -1.0]


def test_padding_of_verl_is_worth_nothing() -> None:
    found = two().rows
    padding = dict(found[0].tag) | {"is_padding": True, "response_len": 1}
    keys, tags = [*(row.key for row in found), "pad1_0_0"], [*(row.tag for row in found), padding]
    values = token_advantages(keys, tags, grpo)
    assert values[-1] == [0.0]
    assert values[:-1] == token_advantages(keys[:-1], tags[:-1], grpo)


def test_a_uid_says_how_its_rollouts_were_asked_for() -> None:
    assert asked_with(uid_of("0f3c", 7, 12)) == ("0f3c", 7)
    assert "_" not in uid_of("0f3c", 7, 12)
    with pytest.raises(ValueError, match="verl splits keys at '_'"):
        uid_of("a_b", 0, 0)


def test_the_tags_of_a_turn_that_several_versions_made_name_the_oldest_and_the_newest() -> None:
    mixed = TURN | {"model_version": "mixed", "response_versions": '[[0,"run.0.1"],[1,"run.0.3"]]'}
    found = rows(*(finished(name, [mixed]) for name in "ab"))
    assert [(row.tag["min_global_steps"], row.tag["max_global_steps"]) for row in found.rows] == [(1, 3)] * 2
