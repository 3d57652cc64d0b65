"""When groups are asked for, and which are trained on: the bounds hold for any order of ends."""

import random

import pytest

from millstream.pipeline.algorithms.pacing import Pacing


def test_without_staleness_each_step_has_the_groups_of_its_own_policy() -> None:
    pacing = Pacing(batch=2)
    assert pacing.admit() == [0, 1]
    assert pacing.admit() == []
    pacing.end(1, 0)
    assert pacing.ready() is None
    pacing.end(0, 0)
    assert pacing.ready() == [0, 1]
    assert pacing.admit() == []  # none before the next version
    pacing.trained([0, 1])
    assert (pacing.step, pacing.admit()) == (1, [2, 3])


def test_what_ends_first_does_not_push_back_what_was_asked_for_first() -> None:
    pacing = Pacing(batch=1, max_staleness=2, drop_above=4)
    assert pacing.admit() == [0, 1, 2]
    for group in (2, 1, 0):
        pacing.end(group, 0)
    assert pacing.ready() == [0]


def test_a_group_that_is_dropped_is_replaced() -> None:
    pacing = Pacing(batch=2)
    pacing.admit()
    pacing.end(0, None)
    pacing.drop(0)
    assert pacing.admit() == [2]
    assert pacing.open == {1: 0, 2: 0}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("staleness", "cap"), [(0, 0), (1, 2), (4, 8)])
def test_the_bounds_hold_whatever_ends_when(seed: int, staleness: int, cap: int) -> None:
    """Admission: never more than (η + v + 1)·B groups that were not dropped. Cap: no batch has an older group."""
    rng = random.Random(seed)
    pacing, dropped, trained = Pacing(3, staleness, cap), 0, set()
    running: list[int] = []
    while pacing.step < 40:
        running += pacing.admit()
        assert pacing.next - dropped <= (staleness + pacing.step + 1) * pacing.batch
        slow = running[0] if rng.random() < 0.9 and len(running) > 1 else None  # one that takes very long
        for group in [g for g in running if g != slow and rng.random() < 0.5]:
            running.remove(group)
            pacing.end(group, rng.randint(pacing.open[group], pacing.step))
        for group in pacing.too_old():
            pacing.drop(group)
            dropped += 1
        if (ready := pacing.ready()) is not None:
            assert max(map(pacing.staleness, ready)) <= cap
            assert not trained.intersection(ready)
            trained.update(ready)
            pacing.trained(ready)
    assert (dropped == 0) or staleness > 0
