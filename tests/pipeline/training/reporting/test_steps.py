"""A step's report as a record."""

import math
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from factories import CONVERSATION, finished, step_report, tokens

from millstream.pipeline.training.groups import Group
from millstream.pipeline.training.report import mean_reward, reward_spread
from millstream.pipeline.training.reporting.steps import numbers, step_record, trained_rollouts, trained_tokens
from millstream.pipeline.training.reporting.stopwatch import Lap
from millstream.schemas.wire import codec

REPORT = step_report(epoch=1, reward_std=0.25, dropped={"too_old": 1})
LAP = Lap(5, 4_000_000_005, dict(REPORT.phases))  # type: ignore[arg-type]


def record(report=REPORT, **fields):
    known = {"experiment_id": "e", "run": "calc", "model_version": "calc.1.5", "trained": ["r1", "r2"]}
    return step_record(report, LAP, **known | fields)


def test_a_record_has_all_of_a_report():
    found = record(restored_from="step-00000004: the process was killed")
    assert (found.experiment_id, found.run, found.epoch, found.step) == ("e", "calc", 1, 5)
    assert (found.model_version, found.restored_from) == ("calc.1.5", "step-00000004: the process was killed")
    assert (found.reward_mean, found.reward_std, found.validation_reward) == (0.75, 0.25, 0.5)
    assert (found.rollouts, found.failed, found.groups, found.dropped) == (16, 2, 3, {"too_old": 1})
    assert (found.staleness_mean, found.staleness_max, found.tokens, found.metrics) == (1.5, 2, 77, {"kl": 0.01})
    assert found.trained == ("r1", "r2")
    assert (found.started_at, found.ended_at) == (5, 4_000_000_005)
    phases = [found.wait_s, found.update_s, found.save_s, found.publish_s, found.other_s]
    assert phases == [1.0, 2.0, 0.5, 0.5, 0.0]
    assert sum(phases) == (found.ended_at - found.started_at) / 1e9
    assert codec.decode(codec.encode(found)) == found
    assert REPORT.idle_share == 0.25


def test_a_step_in_which_nothing_succeeded_has_no_reward():
    found = record(replace(REPORT, reward=0.0, rollouts=2, failed=2, validation_reward=None))
    assert (found.reward_mean, found.reward_std, found.validation_reward) == (None, None, None)


def test_a_report_of_a_step_that_has_not_ended_has_no_idle_share():
    assert replace(REPORT, phases={}).idle_share is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (Decimal("0.5"), 0.5),
        (np.float32(0.5), 0.5),
        (10**400, math.inf),
        (-(10**400), -math.inf),
        (math.inf, math.inf),
    ],
    ids=repr,
)
def test_any_number_of_an_algorithm_is_a_metric(value, expected):
    assert numbers({"kl": value}) == {"kl": expected}


@pytest.mark.parametrize("value", [math.nan, None, "much", [1, 2], np.zeros(2), object(), 1j])
def test_what_is_no_number_is_nan_and_breaks_nothing(value):
    (found,) = codec.decode(codec.encode(record(replace(REPORT, metrics={"kl": value})))).metrics.values()
    assert math.isnan(found)


@pytest.mark.torch
def test_a_tensor_is_a_number_if_it_has_one_element():
    import torch

    found = numbers({"one": torch.tensor(0.5), "two": torch.zeros(2)})
    assert found["one"] == 0.5
    assert math.isnan(found["two"])


def test_the_ledger_has_what_a_learner_learns_from():
    good, untrainable = finished("good", CONVERSATION), finished("bad", CONVERSATION, trainable=False)
    better = finished("better", [tokens([1], [2, 3], [-1.0, -1.0]), {"trainable": False} | tokens([1], [2], [-1.0])])
    empty = finished("empty", [])
    failed = finished("failed", CONVERSATION, "failed")
    groups = [
        Group("g", (good, untrainable, better, empty, failed)),
        Group("h", (finished("alone", CONVERSATION), empty)),
    ]
    assert trained_rollouts(groups) == ["good", "better"]
    assert trained_tokens(groups) == 3 + 2
    assert trained_rollouts([]) == []


def test_the_spread_is_of_the_same_rewards_as_the_mean():
    members = [finished(str(n), [], reward=reward) for n, reward in enumerate([1.0, 0.0, None, math.nan])]
    members.append(finished("failed", [], "failed", reward=100.0))
    assert mean_reward(members) == 0.25
    assert reward_spread(members) == pytest.approx(0.4330127)
    assert reward_spread([]) == 0.0
