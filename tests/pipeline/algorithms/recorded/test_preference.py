# ruff: noqa: E402 — torch comes with the `train` extra
"""Preferences: the losses and their gradients against TRL's formulas, the reference, and which pairs are learnt."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from factories import finished, tokens
from torch import Tensor
from torch.nn.functional import logsigmoid

from examples.calculator import model
from millstream.pipeline.algorithms.recorded.preference import UNRECORDED, PreferenceLearner
from millstream.pipeline.algorithms.rows import Row
from millstream.pipeline.models.policy import load_model
from millstream.pipeline.training.datasets import PairChoice
from millstream.pipeline.training.groups import Group
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.records import Triplet

pytestmark = pytest.mark.torch

BETA = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.create(path, seed=1)
    return path


def answer(name: str, prompt: list[int], response: list[int], reward: float, **fields: Any) -> list[Triplet]:
    turn = {
        "group_id": str(prompt),
        "prompt": str(prompt),
        "response": str(response),
        "reward": reward,
        **tokens(prompt, response, [-1.5] * len(response)),
        **fields,
    }
    return list(finished(name, [turn]).triplets)


# Three pairs, whose prompts and answers have different lengths.
ROLLOUTS = [
    answer("a", [2, 5], [6, 7], 1.0),
    answer("b", [2, 5], [8], 0.0),
    answer("c", [2, 9, 4], [3], 0.5),
    answer("d", [2, 9, 4], [3, 5, 6], 0.25),
    answer("e", [4], [7, 8, 9, 3], 0.1),
    answer("f", [4], [5, 5], -1.0),
]


def summed(policy: Any, prompt: list[int], response: list[int]) -> Tensor:
    """The log-probability of a response, without padding or a batch."""
    logits = policy(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum()


def expected(kind: str, policy: Any, reference: Any, rows: list[Row]) -> Tensor:
    """As TRL computes it (dpo_trainer.py, kto_trainer.py), from whole sequences one by one."""

    def ratio(prompt: list[int], response: list[int]) -> Tensor:
        with torch.no_grad():
            held = summed(reference, prompt, response)
        return summed(policy, prompt, response) - held

    ratios = [ratio(row.prompt, row.response) for row in rows]
    if kind == "ipo":
        ratios = [each / len(row.response) for each, row in zip(ratios, rows, strict=True)]
    chosen, rejected = torch.stack(ratios[0::2]), torch.stack(ratios[1::2])
    if kind == "dpo":
        return -logsigmoid(BETA * (chosen - rejected)).mean()
    if kind == "ipo":
        return ((chosen - rejected - 1 / (2 * BETA)) ** 2).mean()
    with torch.no_grad():
        mismatched = [ratio(row.prompt, rows[(i + 2) % len(rows)].response) for i, row in enumerate(rows)]
        divergence = torch.stack(mismatched).mean().clamp(min=0)
    desirable = 1 - torch.sigmoid(BETA * (chosen - divergence))
    undesirable = 1 - torch.sigmoid(BETA * (divergence - rejected))
    return torch.cat((desirable, undesirable)).mean()


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto"])
def test_losses_and_gradients_are_those_of_trl(folder: Path, kind: str, microbatch: int | None) -> None:
    learner = PreferenceLearner(
        folder, pair_loss=kind, beta=BETA, lr=0.0, epochs=1, minibatch=6, microbatch=microbatch, max_grad_norm=1e9
    )
    rows, _ = learner.rows(ROLLOUTS)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in learner._model.parameters():  # a policy that has left the reference
            parameter.add_(0.02 * torch.randn_like(parameter))
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [rows[2 * i + k] for i in order for k in range(2)]
    policy = load_model(folder).eval()
    policy.load_state_dict(learner._model.state_dict())
    loss = expected(kind, policy, load_model(folder).eval(), shuffled)
    loss.backward()
    assert learner.learn(rows)["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for own, theirs in zip(learner._model.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto"])
def test_better_answers_become_likelier_than_worse_ones(folder: Path, kind: str) -> None:
    learner = PreferenceLearner(folder, pair_loss=kind, beta=BETA, lr=1e-2, epochs=1, minibatch=6)
    rows, refused = learner.rows(ROLLOUTS)
    first, *_, last = [learner.learn(rows) for _ in range(10)]
    assert not refused
    assert first["margin"] == pytest.approx(0, abs=1e-5)  # at first the policy is the reference
    assert last["margin"] > 0.05
    assert last["accuracy"] == 1.0
    assert last["loss"] < first["loss"]
    assert {"lr", "grad_norm"} <= last.keys()
    assert ("divergence" in last) == (kind == "kto")


def test_the_reference_is_the_folder_or_what_was_recorded(folder: Path) -> None:
    """Also for a policy that has already learnt something, as one that goes on has."""
    frozen = PreferenceLearner(folder, lr=1e-2, epochs=1, minibatch=6)
    rows, _ = frozen.rows(ROLLOUTS)
    frozen.learn(rows)
    again, _ = frozen.rows(ROLLOUTS)
    reference = load_model(folder).eval()
    for row, before in zip(again, rows, strict=True):
        assert row.logprobs == before.logprobs
        assert sum(row.logprobs) == pytest.approx(summed(reference, row.prompt, row.response).item(), abs=1e-5)
    recorded, refused = PreferenceLearner(folder, reference="recorded").rows(ROLLOUTS)
    assert [row.logprobs for row in recorded] == [[-1.5] * len(row.response) for row in rows]
    assert not refused


def test_without_recorded_log_probabilities_pairs_are_refused_or_compared_with_the_folder(folder: Path) -> None:
    silent = [answer("a", [2], [6], 1.0, response_logprobs=None), answer("b", [2], [8], 0.0)]
    rows, refused = PreferenceLearner(folder, reference="recorded").rows([*silent, *ROLLOUTS])
    assert len(rows) == len(ROLLOUTS)
    assert refused == {UNRECORDED: 1}
    rows, refused = PreferenceLearner(folder).rows(silent)
    assert len(rows) == 2
    assert not refused


def test_it_learns_from_the_groups_of_a_step_too(folder: Path) -> None:
    """So `PolicyGradient(PreferenceLearner(…))` is online DPO."""
    members = tuple(
        finished(name, [tokens([2, 5], [token], [-1.0]) | {"response": name, "reward": reward}])
        for name, token, reward in (("a", 6, 1.0), ("b", 7, 0.0), ("c", 8, 0.5))
    )
    learner = PreferenceLearner(folder, reference="recorded", choice=PairChoice(every=True))
    metrics = learner.update([Group("g", members)])
    assert (metrics["rows"], metrics["chosen_rollouts"], metrics["dropped_groups"]) == (6, 3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair_loss": "kto", "reference": "recorded"}, 'set reference = "frozen"'),
        ({"pair_loss": "orpo"}, "loss 'orpo': one of dpo, ipo, kto"),
        ({"minibatch": 3}, "give even numbers"),
        ({"microbatch": 5}, "give even numbers"),
    ],
)
def test_options_that_exclude_each_other_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferenceLearner(folder, **options)


def test_a_minibatch_of_one_pair_has_no_other_prompts(folder: Path) -> None:
    learner = PreferenceLearner(folder, pair_loss="kto", epochs=1, minibatch=2)
    rows, _ = learner.rows(ROLLOUTS)
    assert learner.learn(rows)["divergence"] == 0.0
