"""What has been settled is known for as long as a claim can come back, in 8 bytes each."""

from pathlib import Path

import pytest
from factories import event, task
from hypothesis import given
from hypothesis import strategies as st

from millstream.consumers.adapter.settle import PartitionFold
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.settled import FROZEN, SettledMarks, end_mark, packed, retry_mark, unpacked, win_mark

MARKS = st.integers(0, 2**64 - 1)


@given(st.lists(MARKS))
def test_marks_survive_the_log(marks):
    assert unpacked(packed(marks)) == tuple(marks)


def test_half_a_mark_is_refused():
    with pytest.raises(ValueError, match="7 bytes"):
        unpacked(b"\0" * 7)


def test_a_rollout_an_attempt_and_a_winner_of_one_name_have_different_marks():
    assert len({end_mark("x"), retry_mark("x", 1), retry_mark("x", 2), win_mark("x")}) == 4


def test_marks_are_found_wherever_they_lie():
    known = SettledMarks()
    marks = [end_mark(str(n)) for n in range(2 * FROZEN + 10)]
    for mark in marks:
        known.add([mark])
    assert len(known) == len(marks)
    assert all(mark in known for mark in marks)
    assert not any(end_mark(f"other {n}") in known for n in range(1000))


def test_marks_are_forgotten_once_no_claim_can_come_back():
    now = [0.0]
    known = SettledMarks(kept_s=100.0, clock=lambda: now[0])
    for n in range(6):
        now[0] = n * 40.0
        known.add(range(n * FROZEN, (n + 1) * FROZEN))
    assert len(known) == 3 * FROZEN  # of the last 100 s
    assert 5 * FROZEN in known
    assert 0 not in known


def resident():
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_memory_stays_flat_while_one_rollout_is_open_and_100000_others_end():
    """Entry F8, marks: each rollout that has ended takes 16 bytes, and nothing is copied."""
    fold = PartitionFold(lambda trace: ())
    ended, offset = 0, 0

    def feed(value):
        nonlocal offset
        fold.apply(LogRecord(Partition("e", 0), offset, 0, value.rollout_id, value), float(offset))
        offset += 1

    def run(rollouts):
        nonlocal ended
        for n in range(rollouts):
            of = task()
            feed(event(of, "a", "preparing"))
            feed(event(of, "a", "cancelled" if n % 10 == 0 else "succeeded"))
            fold.written(of.rollout_id)
            feed(event(of, "b", "preparing"))  # it is late
        ended += rollouts

    feed(event(task(), "z", "preparing"))
    run(FROZEN)
    before = resident()
    run(100_000 - FROZEN)
    assert (len(fold.open), fold.decided) == (1, {})
    assert resident() - before < 10_000_000
