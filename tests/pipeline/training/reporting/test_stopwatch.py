"""No moment of a training run is lost, and none counts twice."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.pipeline.training.reporting.stopwatch import PHASES, Stopwatch


class Clock:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s

    def ns(self) -> int:
        return 1_800_000_000_000_000_000 + round(self.s * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_each_phase_gets_the_time_in_its_block_and_the_rest_is_other(clock: Clock) -> None:
    watch = Stopwatch(clock, clock.ns)
    clock.s += 1
    with watch.phase("wait"):
        clock.s += 2
    with watch.phase("update"):
        clock.s += 4
    clock.s += 8
    lap = watch.lap()
    assert lap.phases == {"wait": 2.0, "update": 4.0, "save": 0.0, "publish": 0.0, "other": 9.0}
    assert lap.ended_at - lap.started_at == 15 * 10**9


def test_an_inner_block_interrupts_the_outer_one(clock: Clock) -> None:
    watch = Stopwatch(clock, clock.ns)
    with watch.phase("publish"):
        clock.s += 1
        with watch.phase("save"):
            clock.s += 2
        clock.s += 4
    assert watch.lap().phases == {"wait": 0.0, "update": 0.0, "save": 2.0, "publish": 5.0, "other": 0.0}


def test_a_lap_that_ends_within_a_block_goes_on_in_it(clock: Clock) -> None:
    watch = Stopwatch(clock, clock.ns)
    with watch.phase("wait"):
        clock.s += 1
        first = watch.lap()
        clock.s += 2
    second = watch.lap()
    assert (first.phases["wait"], second.phases["wait"]) == (1.0, 2.0)
    assert first.ended_at == second.started_at


def test_an_error_ends_its_phase(clock: Clock) -> None:
    watch = Stopwatch(clock, clock.ns)

    def update() -> None:
        with watch.phase("update"):
            clock.s += 1
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        update()
    clock.s += 2
    assert watch.lap().phases["update"] == 1.0


async def test_blocks_of_tasks_that_overlap_end_in_any_order(clock: Clock) -> None:
    watch, inner, outer = Stopwatch(clock, clock.ns), asyncio.Event(), asyncio.Event()

    async def validation() -> None:
        with watch.phase("wait"):
            inner.set()
            await outer.wait()

    with watch.phase("update"):
        task = asyncio.create_task(validation())
        await inner.wait()
        clock.s += 1
    clock.s += 2  # the validation still runs
    outer.set()
    await task
    clock.s += 4
    assert watch.lap().phases == {"wait": 3.0, "update": 0.0, "save": 0.0, "publish": 0.0, "other": 4.0}


def test_a_clock_that_is_set_back_changes_no_length(clock: Clock) -> None:
    moment = iter([5_000_000_000, 1])
    watch = Stopwatch(clock, lambda: next(moment))
    clock.s += 1
    watch.lap()
    clock.s += 2
    lap = watch.lap()
    assert (lap.started_at, lap.ended_at) == (1 - 2 * 10**9, 1)


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "lap"]), st.sampled_from(PHASES), st.floats(0, 1e5))))
def test_phases_sum_to_the_wall_time_whatever_happens(events: list[tuple[str, str, float]]) -> None:
    clock = Clock()
    watch, laps, opened = Stopwatch(clock, clock.ns), [], []
    for event, name, passed in events:
        clock.s += passed
        if event == "enter":
            opened.append(watch.phase(name))  # type: ignore[arg-type]
            opened[-1].__enter__()
        elif event == "leave" and opened:
            opened.pop(len(opened) // 2).__exit__(None, None, None)
        else:
            laps.append(watch.lap())
    laps.append(watch.lap())
    assert sum(sum(lap.phases.values()) for lap in laps) == pytest.approx(clock.s - 100.0, rel=1e-9, abs=1e-6)
    for lap in laps:
        assert set(lap.phases) == set(PHASES)
        assert min(lap.phases.values()) >= 0
        assert (lap.ended_at - lap.started_at) / 1e9 == pytest.approx(sum(lap.phases.values()), rel=1e-6, abs=1e-6)
    for block in opened:
        block.__exit__(None, None, None)
