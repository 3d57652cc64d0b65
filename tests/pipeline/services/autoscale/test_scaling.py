"""How many runners are wanted, and which are stopped."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.pipeline.services.autoscale.scaling import Decision, OwnRunner, ScalePolicy, Scaler

POLICY = ScalePolicy(lowest=1, highest=5, calm_s=10.0)


def runners(*running: int | None, slots: int = 4) -> list[OwnRunner]:
    """By the attempts that each runs; None for one that has not reported."""
    return [OwnRunner(n) if r is None else OwnRunner(n, slots, r) for n, r in enumerate(running)]


@pytest.mark.parametrize(
    ("work", "others", "own", "start"),
    [
        (0, 0, (), 1),  # the lowest number, also without work
        (100, 0, (), 1),  # nobody knows a runner's slots yet
        (100, 0, (None,), 0),
        (4, 0, (4,), 0),
        (5, 0, (4,), 1),
        (9, 0, (4,), 2),
        (100, 0, (4,), 4),  # the highest number
        (9, 0, (4, None), 1),  # one is starting
        (9, 5, (4,), 0),  # runners elsewhere have five slots
        (9, 0, (4, 4, 4, 4, 4), 0),
    ],
)
def test_it_grows_at_once_to_what_is_wanted(work: int, others: int, own: tuple[int | None, ...], start: int) -> None:
    decision = Scaler(POLICY).decide(0.0, work, others, runners(*own))
    assert (decision.start, decision.stop) == (start, ())


def test_none_runs_without_work_if_none_need_run() -> None:
    scaler = Scaler(ScalePolicy(lowest=0, highest=5))
    assert scaler.decide(0.0, 0, 0, []) == Decision()
    assert scaler.decide(0.0, 7, 0, []).start == 1
    assert scaler.decide(0.0, 7, 0, runners(None)).start == 0
    assert scaler.decide(0.0, 7, 0, runners(4)).start == 1
    assert scaler.decide(0.0, 12, 0, []).start == 3, "the slots that a runner had are remembered"


def test_it_shrinks_once_less_has_been_wanted_for_a_while() -> None:
    scaler = Scaler(POLICY)
    own = runners(0, 0, 0)
    assert scaler.decide(0.0, 0, 0, own).stop == ()
    assert scaler.decide(9.9, 0, 0, own).stop == ()
    assert scaler.decide(10.0, 0, 0, own).stop == (2, 1), "the ones started last"
    assert scaler.decide(12.0, 0, 0, own[:1]).stop == ()


def test_work_in_between_begins_the_wait_again() -> None:
    scaler = Scaler(POLICY)
    own = runners(0, 0)
    scaler.decide(0.0, 0, 0, own)
    scaler.decide(8.0, 8, 0, own)
    assert scaler.decide(12.0, 0, 0, own).stop == ()
    assert scaler.decide(22.0, 0, 0, own).stop == (1,)


@pytest.mark.parametrize(
    ("own", "work", "stop"),
    [
        ((1, 0, 1), 2, (1,)),  # the idle one, of two that are too many
        ((1, 1, 1), 3, ()),
        ((0, 1, 1), 2, (0,)),
        ((1, None, 0), 1, (2,)),  # one that has not reported may be busy
        ((0, 0, 0), 5, (2,)),
    ],
)
def test_a_busy_runner_is_never_stopped(own: tuple[int | None, ...], work: int, stop: tuple[int, ...]) -> None:
    scaler = Scaler(POLICY)
    scaler.decide(0.0, work, 0, runners(*own))
    assert scaler.decide(10.0, work, 0, runners(*own)).stop == stop


loads = st.lists(st.one_of(st.none(), st.integers(0, 6)), max_size=8)


@given(
    st.integers(0, 3),
    st.integers(0, 8),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 20), loads, st.integers(1, 6)), min_size=1, max_size=8),
)
def test_whatever_comes(lowest: int, more: int, looks: list[tuple[int, int, list[int | None], int]]) -> None:
    policy = ScalePolicy(lowest, lowest + more, calm_s=5.0)
    scaler = Scaler(policy)
    for second, (work, others, running, slots) in enumerate(looks):
        own = runners(*running, slots=slots)
        decision = scaler.decide(second * 3.0, work, others, own)
        assert policy.lowest <= decision.wanted <= policy.highest
        assert not (decision.start and decision.stop)
        assert len(own) + decision.start <= max(policy.highest, len(own))
        assert len(own) - len(decision.stop) >= decision.wanted or not decision.stop
        assert all(own[number].idle for number in decision.stop)
        if any(runner.slots for runner in own):
            enough = math.ceil(max(work - others, 0) / slots)
            assert len(own) + decision.start >= min(enough, policy.highest)
        if second < 2:
            assert not decision.stop, "less has not been wanted for long enough"
