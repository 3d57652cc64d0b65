"""The fold behind the monitor."""

import sys
from dataclasses import replace
from typing import Any

import pytest
from factories import event, task

from millstream.pipeline.services.kpis import Kpis, quantiles
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import RolloutEnd, Worker

S = 1_000_000_000
NOW = 1_800_000_000 * S


def end(*, ended: float = 1.0, latency: float = 2.0, **fields: Any) -> RolloutEnd:
    """A rollout that ended ``ended`` seconds before NOW, ``latency`` after it was published."""
    ended_at = NOW - int(ended * S)
    created_at = ended_at - int(latency * S)
    defaults: dict[str, Any] = {
        "rollout_id": new_id(),
        "group_id": "g",
        "group_size": 1,
        "status": "succeeded",
        "attempts": 1,
        "created_at": created_at,
        "started_at": created_at + S // 2,
        "ended_at": ended_at,
    }
    return RolloutEnd(**defaults | fields)


def worker(worker_id: str, *, seen: float = 1.0, **fields: Any) -> Worker:
    defaults = {"role": "runner", "host": "h", "version": "1", "slots": 8, "running": 2, "started": 0}
    return Worker(worker_id=worker_id, last_seen=NOW - int(seen * S), **defaults | fields)


def test_the_window_holds_the_last_minute_by_experiment_and_mode():
    kpis = Kpis()
    for n in range(30):
        kpis.add(end(latency=n + 1, status="failed" if n < 6 else "succeeded", experiment_id="a", lost_attempts=n == 0))
    kpis.add(end(attempts=3, mode="val"))
    kpis.add(end(ended=61))
    now = kpis.snapshot(NOW)
    assert (now["rollouts"], now["rollouts_per_second"]) == (31, pytest.approx(31 / 60))
    assert (now["retries"], now["lost_attempts"]) == (2, 1)
    val, train = now["groups"]
    assert (val["experiment"], val["mode"], val["retries"]) == ("", "val", 2)
    assert (train["experiment"], train["mode"], train["success_rate"]) == ("a", "train", 0.8)
    assert train["latency_s"] == pytest.approx({"p50": 15, "p90": 27, "p99": 30})
    assert train["queued_s"]["p50"] == pytest.approx(0.5)
    assert kpis.ended["train", "succeeded"] == 25  # totals have no window
    later = kpis.snapshot(NOW + 60 * S)
    assert (later["rollouts"], later["success_rate"], later["latency_s"]["p50"], later["groups"]) == (0, None, None, [])


def test_an_end_that_comes_again_counts_once():
    kpis, one = Kpis(), end()
    kpis.add(one)
    kpis.add(one)
    assert kpis.snapshot(NOW)["rollouts"] == kpis.ended.total() == 1


def test_utilisation_is_of_the_runners_that_live():
    kpis = Kpis()
    assert kpis.snapshot(NOW)["utilisation"] is None
    kpis.add(worker("a", running=0))
    kpis.add(worker("a", running=6))
    kpis.add(worker("b", running=2))
    kpis.add(worker("dead", seen=61, running=8))
    kpis.add(worker("adapter", role="adapter", slots=0, running=0))
    now = kpis.snapshot(NOW)
    assert (now["runners"], now["slots"], now["running"], now["utilisation"]) == (2, 16, 8, 0.5)


def status_after(kpis: Kpis, record: Any) -> str:
    kpis.add(record)
    found = kpis.rollout(record.rollout_id)
    assert found is not None
    return str(found["status"])


def test_a_rollouts_status_follows_its_records():
    kpis, first = Kpis(), task(mode="val")
    assert kpis.rollout(first.rollout_id) is None
    assert status_after(kpis, first) == "queued"
    assert status_after(kpis, event(first, "a1", "preparing")) == "running"
    assert status_after(kpis, event(first, "a1", "failed")) == "running"
    assert status_after(kpis, event(first, "a1", "retry")) == "retrying"
    assert status_after(kpis, event(first, "a1", "running")) == "retrying"  # a zombie
    second = replace(first, attempt=2)
    assert status_after(kpis, event(second, "a2", "preparing")) == "running"
    assert status_after(kpis, end(rollout_id=first.rollout_id, mode="val", reward=1.5)) == "succeeded"
    assert status_after(kpis, event(second, "a2", "failed")) == "succeeded"
    found = kpis.rollout(first.rollout_id)
    assert found is not None
    assert (found["mode"], found["reward"]) == ("val", 1.5)
    assert [(a["attempt_id"], a["status"]) for a in found["attempts"]] == [("a1", "retry"), ("a2", "preparing")]


def test_errors_are_told():
    kpis, one = Kpis(), task()
    kpis.add(event(one, "a", "preparing"))
    kpis.add(event(one, "a", "failed"))
    found = kpis.rollout(one.rollout_id)
    assert found is not None
    assert found["attempts"][0]["error"] == "ValueError: no"


def test_an_attempt_claimed_before_our_time_runs():
    assert status_after(Kpis(), event(task(), "a", "running")) == "running"


def test_memory_stays_bounded():
    kpis = Kpis(rollouts=50)
    beating = task(input="x" * 100_000)
    for n in range(200):
        one = task(input="x" * 100_000)
        kpis.add(one)
        kpis.add(event(one, "a", "preparing"))
        kpis.add(event(beating, "a", "preparing" if n == 0 else "running", output="y" * 100_000))
        for attempt in range(3):
            kpis.add(event(beating, f"{n}.{attempt}", "preparing"))
    assert kpis.rollout(one.rollout_id) is not None
    assert kpis.rollout(beating.rollout_id) is not None  # heard of just now
    assert len(kpis._rollouts) == 50
    assert len(kpis._rollouts[beating.rollout_id].events) <= 64
    kept = [e for seen in kpis._rollouts.values() for e in seen.events]
    assert sum(len(codec.encode(e)) + sys.getsizeof(e) for e in kept) < 50_000


def test_quantiles_are_by_nearest_rank():
    assert quantiles([]) == {"p50": None, "p90": None, "p99": None}
    assert quantiles([5.0]) == {"p50": 5.0, "p90": 5.0, "p99": 5.0}
    assert quantiles(range(100, 0, -1)) == {"p50": 50, "p90": 90, "p99": 99}
