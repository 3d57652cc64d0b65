"""Health: ages against limits, readiness, metrics."""

import asyncio
import time
from collections.abc import Callable

import pytest
from exposition import checked

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.poll_times import PollTimes
from millstream.pipeline.services.health import Health, HealthPolicy
from millstream.producers.supervisor import Supervisor
from millstream.schemas.metrics import CALLS_DROPPED, MEMORY_LIMIT, RUNNING, STARVING, TRANSACTION_AGE, UNCLAIMED
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", 1)


async def test_a_role_is_ready_when_all_its_consumers_poll_and_until_it_stops() -> None:
    stop, log = asyncio.Event(), MemoryLog(TOPICS)
    health = Health(log.polls, stop)
    first, second = log.consumer(), log.consumer("g")
    await first.assign([Partition(TOPICS.control, 0)])
    await second.subscribe([TOPICS.events])
    await first.poll(1, 0)
    assert health.answer("/readyz") == (503, b"not ready\n")
    await second.poll(1, 0)
    assert health.answer("/readyz") == (200, b"ready\n")
    health.trouble = lambda: "the store is away"
    assert health.answer("/readyz") == (503, b"the store is away\n")
    stop.set()
    assert health.answer("/readyz") == (503, b"not ready\n")


def test_metrics_are_exported_by_type() -> None:
    health = Health(list, asyncio.Event())
    health.export(RUNNING, lambda: 3)
    health.export(CALLS_DROPPED, lambda: 4)
    text = health.answer("/metrics")[1].decode()
    for line in (
        "millstream_runner_running 3.0",
        "millstream_calls_dropped_total 4.0",
        "# TYPE millstream_runner_running gauge",
    ):
        assert line in text
    assert "# HELP millstream_poll_age_seconds" in text


def polled(ago_s: float | None, *, polling_for_s: float | None = None) -> PollTimes:
    now = time.monotonic()
    return PollTimes(
        last_poll=None if ago_s is None else now - ago_s,
        polling_since=None if polling_for_s is None else now - polling_for_s,
    )


@pytest.mark.parametrize(
    ("polls", "allow_idle", "alive"),
    [
        (list, False, True),
        (lambda: [polled(None)], False, True),
        (lambda: [polled(1), polled(200)], False, True),
        (lambda: [polled(1), polled(400)], False, False),
        (lambda: [polled(400)], True, True),
        (lambda: [polled(400, polling_for_s=200)], True, True),
        (lambda: [polled(400, polling_for_s=400)], True, False),
    ],
)
def test_the_consumer_that_has_not_polled_for_longest_counts(
    polls: Callable[[], list[PollTimes]], allow_idle: bool, alive: bool
) -> None:
    health = Health(polls, asyncio.Event(), allow_idle=allow_idle)
    assert health.answer("/livez")[0] == (200 if alive else 503)


def test_an_age_beyond_its_limit_is_reported_by_name() -> None:
    health, seconds = Health(list, asyncio.Event()), 0.0
    health.check(STARVING, lambda: seconds)
    health.check(TRANSACTION_AGE, lambda: 1.0, limit_s=400.0)
    body = "millstream_starving_seconds {}\nmillstream_transaction_call_seconds 1.0\n"
    alive, text = health.answer("/livez")
    assert (alive, text.decode().endswith(body.format(seconds))) == (200, True)
    seconds = HealthPolicy().stuck_s + 1
    alive, text = health.answer("/livez")
    assert alive == 503
    assert text.decode().endswith(body.format(seconds) + f"millstream_starving_seconds is {seconds:.0f}\n")
    assert f"millstream_starving_seconds {seconds}".encode() in health.answer("/metrics")[1]


def test_a_value_that_changes_while_it_is_read_does_not_fail_the_metrics() -> None:
    """Section F8: the probes' thread sums up what the role's thread changes."""
    health, calls = Health(list, asyncio.Event()), {0: 1}

    def value() -> float:
        if len(calls) < 5:
            for call in calls:
                calls[len(calls)] = call
        return sum(calls.values())

    health.export(RUNNING, value)
    assert "millstream_runner_running 1.0" in health.answer("/metrics")[1].decode()
    assert len(calls) == 5


def test_a_background_task_without_success_for_too_long_fails_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section B1: the age of the control follower has a limit."""
    background = Supervisor()
    health = Health(list, asyncio.Event(), background=background)
    monkeypatch.setattr(Supervisor, "age_s", HealthPolicy().background_s - 1)
    assert health.answer("/livez")[0] == 200
    monkeypatch.setattr(Supervisor, "age_s", HealthPolicy().background_s + 1)
    assert health.answer("/livez")[0] == 503
    assert "millstream_background_age_seconds 601.0" in health.answer("/metrics")[1].decode()
    assert health.answer("/readyz")[0] == 503


def test_an_age_is_never_negative() -> None:
    """Defect 7: what it is counted from may be newer than the look at the clock."""
    health = Health(list, asyncio.Event())
    health.check(STARVING, lambda: -3e-06)
    assert b"\nmillstream_starving_seconds 0.0\n" in health.answer("/metrics")[1]
    assert b"-" not in health.answer("/livez")[1]
    later = Health(lambda: [PollTimes(last_poll=time.monotonic() + 5)], asyncio.Event())
    assert b"\nmillstream_poll_age_seconds 0.0\n" in later.answer("/metrics")[1]


def test_values_have_labels_or_are_absent() -> None:
    health = Health(list, asyncio.Event())
    health.export(UNCLAIMED, lambda: {("low",): 2, ("high",): 1})
    health.export(MEMORY_LIMIT, lambda: None)
    text = health.answer("/metrics")[1].decode()
    samples = checked(text)
    assert samples["millstream_unclaimed_tasks"] == {(("priority", "high"),): 1, (("priority", "low"),): 2}
    assert "millstream_memory_limit_bytes" not in text


def test_two_metrics_of_one_name_are_refused() -> None:
    health = Health(list, asyncio.Event())
    health.export(RUNNING, lambda: 1)
    with pytest.raises(ValueError, match="millstream_runner_running"):
        health.export(RUNNING, lambda: 2)
