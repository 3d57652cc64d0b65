# ruff: noqa: E402 — torch comes with the `train` extra
"""Which answers are imitated, token by token, and that they become likelier."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from factories import CONVERSATION, finished, tokens

from examples.calculator import model
from millstream.pipeline.algorithms.recorded.imitation import ImitationLearner
from millstream.pipeline.training.datasets import Choice, chosen
from millstream.pipeline.training.groups import Group
from millstream.schemas.wire.records import Triplet

pytestmark = pytest.mark.torch

USER = {"role": "user", "content": "add 3 to 8 ?"}
ADD, MULTIPLY = ({"role": "assistant", "content": word} for word in ("add", "multiply"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.create(path, seed=1)
    return path


def rollout(name: str, *turns: dict[str, Any], group: str = "g") -> list[Triplet]:
    return list(finished(name, [{"group_id": group} | turn for turn in turns]).triplets)


def text(prompt: list[dict[str, Any]], response: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A turn without token ids."""
    return {"prompt": json.dumps(prompt), "response": json.dumps(response), **fields}


def earned(rollouts: list[list[Triplet]], choice: Choice) -> list[tuple[str, int, float]]:
    return [(triplet.rollout_id, triplet.turn, reward) for triplet, reward in chosen(rollouts, choice)]


TURN = tokens([2, 5], [6], [-1.0])
ROLLOUTS = [
    rollout("a", TURN | {"reward": 0.5}, TURN | {"reward": 0.5}),
    rollout("b", TURN | {"reward": 0.9}, TURN | {"reward": 0.0}),
    rollout("c", TURN | {"reward": 1.0}, group="h"),
    rollout("d", TURN | {"reward": 2.0, "trainable": False, "reason": "no"}, group="h"),
    rollout("e", TURN, TURN | {"reward": 1.0}, group="i"),
]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(), {("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("e", 0), ("e", 1)}),
        (Choice(min_reward=0.9), {("b", 0), ("c", 0), ("e", 0), ("e", 1)}),
        (Choice(best_of_group=1), {("a", 0), ("a", 1), ("c", 0), ("e", 0), ("e", 1)}),
        (Choice(min_reward=0.9, best_of_group=1), {("c", 0), ("e", 0), ("e", 1)}),
        (Choice(min_reward=3.0), set()),
    ],
)
def test_what_is_chosen(choice: Choice, expected: set[tuple[str, int]]) -> None:
    """A final reward counts for the turns before it; what can't be trained on is no member of its group."""
    found = earned(ROLLOUTS, choice)
    assert {(name, turn) for name, turn, _ in found} == expected
    assert ("e", 0, 1.0) in found or not expected


def test_answers_alone_are_learnt_whether_turns_are_merged_or_not(folder: Path) -> None:
    turns = rollout("r", *CONVERSATION)
    rows, refused = ImitationLearner(folder).rows([turns])
    assert [(row.prompt, row.response, row.ce) for row in rows] == [
        ([2, 5], [6], [1.0]),
        ([2, 5, 6, 8, 9], [3, 4], [1.0, 1.0]),
    ]
    assert not refused
    (row,), _ = ImitationLearner(folder, merge_turns=True).rows([turns])
    assert (row.prompt, row.response) == ([2, 5], [6, 8, 9, 3, 4])
    assert row.ce == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert not any(row.rl)
    assert sum(row.rewards) == 2.0  # the last turn's reward counts for both


def test_the_chat_template_gives_the_tokens_that_were_not_recorded(folder: Path) -> None:
    learner = ImitationLearner(folder)
    (row,), refused = learner.rows([rollout("r", text([USER], ADD))])
    read = learner._tokenizer.decode
    assert read(row.prompt) == "<|im_start|> user add 3 to 8? <|im_end|> <|im_start|> assistant".replace("8?", "8 ?")
    assert read(row.response) == "add <|im_end|>"  # the end is learnt, too
    assert row.ce == [1.0, 1.0]
    assert not refused


def test_what_cant_be_learnt_is_counted_by_reason(folder: Path) -> None:
    beyond = 10_000
    rows, refused = ImitationLearner(folder, choice=Choice()).rows(
        [
            rollout("r", tokens([2], [beyond], [-1.0])),
            rollout("s", text([USER], {"no role": 1}), TURN),
            rollout("t", text([USER], {"role": "assistant", "content": None})),
        ]
    )
    assert [row.rollout_id for row in rows] == ["s", "t"]
    assert sorted(reason[:40] for reason in refused) == sorted(
        ["rollout s, turn 0: its response is not i", f"turn 0: token id {beyond} is none of the model"[:40]]
    )


@pytest.mark.parametrize("lr", [1e-2, 0.0])
def test_the_best_of_each_group_become_likelier(folder: Path, lr: float) -> None:
    """Rejection sampling, in a step of training: with its control."""
    learner = ImitationLearner(folder, lr=lr, epochs=1)
    good, bad = tokens([2, 5, 9], [6], [-3.0]), tokens([2, 5, 9], [7], [-3.0])
    group = Group("g", (finished("r", [good | {"reward": 1.0}]), finished("s", [bad | {"reward": 0.0}])))
    rows, _ = learner.rows([group.members[0].triplets])
    (before,) = learner._evaluated(learner._model, rows)
    metrics = learner.update([group])
    (after,) = learner._evaluated(learner._model, rows)
    assert (metrics["chosen_rollouts"], metrics["rows"]) == (1.0, 1.0)
    assert metrics["ce"] == pytest.approx(-before[0], abs=1e-4)
    assert after[0] > before[0] + 0.1 if lr else after == before


def test_a_step_without_a_success_changes_nothing(folder: Path) -> None:
    learner = ImitationLearner(folder, choice=Choice(min_reward=0.5))
    group = Group("g", (finished("r", [TURN | {"reward": 0.0}]), finished("s", [TURN], status="failed")))
    assert learner.update([group]) == {"dropped_groups": 0.0, "dropped_turns": 0.0, "chosen_rollouts": 0.0, "rows": 0.0}
