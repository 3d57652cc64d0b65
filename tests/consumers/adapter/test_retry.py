"""What is retried, and when."""

import pytest
from factories import task
from hypothesis import given
from hypothesis import strategies as st

from millstream.consumers.adapter.retry import BACKOFF_S, OUTAGES, backoff_s, next_task, refusal
from millstream.schemas.wire import status


@given(st.sampled_from(sorted(BACKOFF_S)), st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_backoff_lies_anywhere_below_an_exponential_bound(how, times, jitter):
    base, cap = BACKOFF_S[how]
    assert backoff_s((base, cap), times, lambda: 0.0) == 0.0
    assert 0 <= backoff_s((base, cap), times, lambda: jitter) <= backoff_s((base, cap), times, lambda: 1.0) <= cap
    assert backoff_s((base, cap), 3, lambda: 1.0) == 4 * base


def test_every_status_that_may_be_retried_has_a_backoff():
    assert BACKOFF_S.keys() == status.RETRIED | {status.LOST}


@given(
    st.lists(st.sampled_from(sorted(status.TERMINAL - {status.SUCCEEDED})), min_size=40, max_size=40),
    st.integers(1, 5),
    st.integers(0, 5),
)
def test_the_budgets_are_kept_apart(ends, max_attempts, max_lost_attempts):
    of = task(max_attempts=max_attempts, max_lost_attempts=max_lost_attempts)
    made = []
    for how in ends:
        made.append(how)
        why = refusal(of, how)
        if why is not None:
            break
        of = next_task(of, how, None)
        assert of.attempt == len(made) + 1
    lost_attempts = made.count(status.LOST)
    failures = len(made) - lost_attempts
    if made[-1] == status.CANCELLED:
        assert why == "not_retried"
    elif made[-1] == status.LOST:
        assert (why, lost_attempts) == ("lost_attempts_exhausted", max_lost_attempts + 1)
    else:
        assert (why, failures) == ("attempts_exhausted", max_attempts)


def test_an_attempt_lost_with_its_proxy_costs_no_budget_up_to_a_bound():
    of = task(max_attempts=1, max_lost_attempts=2)
    for _ in range(OUTAGES):
        assert refusal(of, status.LOST, cause=status.PROXY_AWAY) is None
        of = next_task(of, status.LOST, None, cause=status.PROXY_AWAY)
    assert (of.lost_attempts, of.max_lost_attempts, of.attempt) == (OUTAGES, OUTAGES + 2, OUTAGES + 1)
    for _ in range(2):  # the others have their own budget, which is whole; so has a proxy that never answers again
        assert refusal(of, status.LOST, cause=status.PROXY_AWAY) is None
        of = next_task(of, status.LOST, None, cause=status.PROXY_AWAY)
    assert refusal(of, status.LOST, cause=status.PROXY_AWAY) == "lost_attempts_exhausted"
    assert refusal(of, status.FAILED, cause="ValueError") == "attempts_exhausted"


def test_crashes_of_shared_processes_are_counted():
    of = next_task(task(max_lost_attempts=9), status.LOST, None, cause=status.CRASH)
    of = next_task(of, status.LOST, None, cause="lease")
    of = next_task(of, status.FAILED, None, cause=status.CRASH)
    assert (of.crashes, of.lost_attempts) == (1, 2)


@pytest.mark.parametrize(("priority", "to"), [("low", "low"), ("urgent", "normal")])
def test_a_priority_of_no_topic_goes_to_the_normal_ones(priority, to):
    assert next_task(task(priority=priority), status.LOST, None).priority == to


@pytest.mark.parametrize(
    ("retry_override", "retry_on", "attempt", "why"),
    [
        ("yes", ("timeout",), 1, None),
        ("yes", (), 3, "attempts_exhausted"),
        ("no", ("failed",), 1, "not_retried"),
        (None, ("timeout",), 1, "not_retried"),
    ],
)
def test_a_hooks_wish_stands_in_place_of_retry_on_but_spends_the_same_budget(retry_override, retry_on, attempt, why):
    of = task(max_attempts=3, attempt=attempt, retry_on=retry_on)
    assert refusal(of, status.FAILED, retry_override) == why
