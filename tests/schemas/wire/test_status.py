"""The transition table, and a rollout's status as a fold over its events."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.schemas.wire.records import AttemptEvent, RolloutEnd
from millstream.schemas.wire.status import (
    CANCELLED,
    FAILED,
    LOST,
    PREPARING,
    RETRY,
    RUNNING,
    SUCCEEDED,
    TERMINAL,
    TIMEOUT,
    TRANSITIONS,
    UNRESPONSIVE,
    may_follow,
    rollout_status,
)

STATUSES = [PREPARING, RUNNING, SUCCEEDED, FAILED, TIMEOUT, UNRESPONSIVE, CANCELLED, LOST, RETRY]

# The table written out by hand, so that a change of it is deliberate.
ALLOWED = {
    (None, PREPARING),
    (PREPARING, PREPARING),
    (PREPARING, RUNNING),
    (RUNNING, RUNNING),
    *product([PREPARING, RUNNING], [SUCCEEDED, FAILED, TIMEOUT, UNRESPONSIVE, CANCELLED, LOST]),
    *product([FAILED, TIMEOUT, UNRESPONSIVE, LOST], [RETRY]),
}


def event(status: str, attempt: int = 1) -> AttemptEvent:
    return AttemptEvent(
        rollout_id="r", attempt_id=f"a{attempt}", attempt=attempt, status=status, worker_id="w", time=1, lease_s=30.0
    )


def end(status: str) -> RolloutEnd:
    return RolloutEnd(rollout_id="r", group_id="g", group_size=1, status=status, attempts=1, created_at=1, ended_at=2)


@pytest.mark.parametrize("current", [None, *STATUSES])
@pytest.mark.parametrize("new", STATUSES)
def test_every_transition(current: str | None, new: str) -> None:
    assert may_follow(current, new) == ((current, new) in ALLOWED)


def test_the_table_knows_every_status() -> None:
    assert set(TRANSITIONS) == {None, *STATUSES}


def test_an_unknown_status_never_follows_and_is_never_followed() -> None:
    assert not may_follow(RUNNING, "paused")
    assert not may_follow("paused", RUNNING)


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([], "queued"),
        ([event(PREPARING)], "running"),
        ([event(PREPARING), event(RUNNING), event(RUNNING)], "running"),
        ([event(PREPARING), event(RUNNING), event(FAILED)], "running"),  # the adapter decides what comes next
        ([event(PREPARING), event(FAILED), event(RETRY)], "retrying"),
        ([event(PREPARING), event(FAILED), event(RETRY), event(PREPARING, 2)], "running"),
        ([event(PREPARING), event(RUNNING), event(RETRY)], "retrying"),  # its lease ran out
        ([event(PREPARING), event(RETRY), event(RUNNING)], "retrying"),  # what it writes after that is ignored
        ([event(PREPARING, 2), event(RETRY, 2), event(PREPARING, 1)], "retrying"),  # an old task, delivered twice
        ([event(PREPARING), event(SUCCEEDED), end("succeeded")], "succeeded"),
        ([event(PREPARING), end("failed"), event(PREPARING, 2)], "failed"),
        ([end("cancelled")], "cancelled"),
        ([event(RUNNING)], "queued"),  # never claimed
    ],
)
def test_a_rollout_has_the_status_of_its_events(events: list[AttemptEvent | RolloutEnd], status: str) -> None:
    assert rollout_status(events) == status


@given(
    st.lists(st.builds(event, st.sampled_from(STATUSES), st.integers(1, 3))),
    st.sampled_from(["succeeded", "failed", "cancelled"]),
    st.lists(st.builds(event, st.sampled_from(STATUSES), st.integers(1, 3))),
)
def test_the_end_is_final(before: list[AttemptEvent], status: str, after: list[AttemptEvent]) -> None:
    assert rollout_status(before) in {"queued", "running", "retrying"}
    assert rollout_status([*before, end(status), *after]) == status


@given(st.lists(st.sampled_from(STATUSES)), st.sampled_from(sorted(TERMINAL)), st.lists(st.sampled_from(STATUSES)))
def test_a_terminal_status_is_only_left_by_a_retry_mark(before: list[str], terminal: str, after: list[str]) -> None:
    current: str | None = None
    for status in [*before, terminal, *after]:
        if may_follow(current, status):
            assert current not in TERMINAL or status == RETRY
            current = status
