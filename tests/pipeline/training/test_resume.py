"""A run that is interrupted goes on exactly where it was."""

import dataclasses
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from resumable import PER_STEP, SIZE, Chain, agent, train

from millstream.consumers.log.port import Log
from millstream.pipeline.algorithms.guards import Diverged, non_finite
from millstream.pipeline.algorithms.policy_gradient import NothingToLearn
from millstream.pipeline.training.deployment import in_memory
from millstream.pipeline.training.strategy import Setup
from millstream.schemas.errors import ConfigError
from millstream.schemas.folders import held_folder

pytestmark = pytest.mark.torch


class Stops(Chain):
    """Breaks off at some updates."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at = at

    def update(self, groups: Any) -> dict[str, float]:
        if len(self.ledger) in self.at:
            raise ZeroDivisionError("stop")
        return super().update(groups)


def numbers(learner: Chain) -> list[list[str]]:
    return [list(step) for step in learner.ledger]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    learner = Chain()
    train(tmp_path_factory.mktemp("run"), learner, agent=agent)
    return learner


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_run_that_goes_on_has_the_weights_of_one_that_never_stopped(
    tmp_path: Path, uninterrupted: Chain, every: int
) -> None:
    for at in (0, 3, 5):
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, Stops(at), agent=agent, checkpoint_every=every)
    learner = Chain()
    summary = train(tmp_path, learner, agent=agent, checkpoint_every=every)
    assert learner.weight.item() == uninterrupted.weight.item()
    assert numbers(learner) == numbers(uninterrupted)
    assert [step.step for step in summary.steps] == list(range(6))
    versions = [step.model_version for step in summary.steps]
    assert len(set(versions)) == 6
    assert summary.rollouts == 6 * PER_STEP * SIZE


def test_a_run_that_is_over_is_not_trained_further(tmp_path: Path, uninterrupted: Chain) -> None:
    learner = Chain()
    first = train(tmp_path, learner, agent=agent)
    again = train(tmp_path, Stops(6), agent=agent)
    assert (again.experiment_id, len(again.steps)) == (first.experiment_id, 6)
    longer = Chain()
    train(tmp_path, longer, agent=agent, steps=8)
    assert numbers(longer)[:6] == numbers(learner)
    assert len(longer.ledger) == 8


def test_a_run_can_go_on_from_an_earlier_step_in_a_new_epoch(tmp_path: Path, uninterrupted: Chain) -> None:
    train(tmp_path, Chain(), agent=agent)
    learner = Chain()
    summary = train(tmp_path, learner, agent=agent, resume="step-5")
    assert learner.weight.item() == uninterrupted.weight.item()
    assert [s.model_version for s in summary.steps] == [f"run.0.{n}" for n in range(5)] + ["run.1.5"]
    with pytest.raises(ConfigError, match=r"no such checkpoint; .* has step-4, step-5, step-6"):
        train(tmp_path, learner, agent=agent, resume="step-2")
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        train(tmp_path, learner, agent=agent, resume="never")


def test_another_run_is_refused_before_its_first_step(tmp_path: Path) -> None:
    train(tmp_path, Chain(), agent=agent, steps=1)
    with pytest.raises(ConfigError, match="with other seed"):
        train(tmp_path, Stops(0), agent=agent, seed=5)
    with pytest.raises(ConfigError, match="with other run"):
        train(tmp_path, Stops(0), agent=agent, run="other")


@pytest.mark.parametrize("max_staleness", [1, 4])
def test_no_group_is_trained_on_twice_when_rollouts_run_ahead(tmp_path: Path, max_staleness: int) -> None:
    for at in (2, 5):
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, Stops(at), agent=agent, max_staleness=max_staleness)
    learner = Chain()
    summary = train(tmp_path, learner, agent=agent, max_staleness=max_staleness)
    trained = [number for step in learner.ledger for number in step]
    assert len(trained) == len(set(trained)) == 6 * PER_STEP
    assert all(len(ids) == len(set(ids)) == SIZE for step in learner.ledger for ids in step.values())
    assert max(step.staleness_max for step in summary.steps) <= 2 * max_staleness
    assert any(step.staleness_mean > 0 for step in summary.steps)


class Breaks(Chain):
    """Reports NaN at some updates (counted over all), as a learner that diverges."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def update(self, groups: Any) -> dict[str, float]:
        self.calls += 1
        metrics = super().update(groups)
        return metrics | {"loss": math.nan if self.calls in self.at else 0.0}


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_bad_step_is_undone_and_what_it_saw_is_not_asked_for_again(tmp_path: Path, max_staleness: int) -> None:
    learner = Breaks(3)
    summary = train(tmp_path, learner, agent=agent, guards=(non_finite,), max_staleness=max_staleness)
    assert [s.model_version for s in summary.steps] == ["run.0.0", "run.0.1", *(f"run.1.{n}" for n in range(2, 6))]
    trained = [number for step in learner.ledger for number in step]
    assert len(trained) == len(set(trained)) == 6 * PER_STEP


def test_steps_that_stay_bad_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 3 was bad: loss not finite; 3 rollbacks did not help"):
        train(tmp_path, Breaks(3, 4, 5, 6), agent=agent, guards=(non_finite,))
    learner = Chain()  # the supervisor's next try
    train(tmp_path, learner, agent=agent)
    assert len(learner.ledger) == 6


def test_a_step_without_a_usable_rollout_ends_the_run_with_the_commonest_error(tmp_path: Path) -> None:
    class Policy(Chain):
        model = tmp_path  # a policy is trained

    def fails(task: dict[str, int]) -> float:
        raise ValueError("no key" if task["number"] % 5 else "other")

    @asynccontextmanager
    async def without_a_server(setup: Setup) -> AsyncIterator[tuple[Log, None]]:
        async with in_memory(dataclasses.replace(setup, model=None)) as (log, _):
            yield log, None

    with pytest.raises(
        NothingToLearn, match=r"none of the 6 rollouts of a step can be trained on; [3-6] say: .*no key"
    ):
        train(tmp_path, Policy(), agent=fails, strategy=without_a_server)


def test_a_second_trainer_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    with held_folder(tmp_path, "run_dir"), pytest.raises(ConfigError, match=r"run_dir .* is in use by process"):
        train(tmp_path, Chain(), agent=agent)
    train(tmp_path, Chain(), agent=agent, steps=1)
