"""What the adapter counts, and when: each decision once, with the values that its end holds."""

from dataclasses import replace

from factories import task
from prometheus_client import CollectorRegistry

from millstream.consumers.adapter.decision import Decision, Retry, end_of
from millstream.consumers.adapter.metrics import AdapterMetrics
from millstream.consumers.adapter.transaction import Transaction
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, DeadLetter

EVENTS = Partition("t.events", 0)
S = 1_000_000_000


def decided(of, how, *, queued_s, seconds, retry=False, dead=()):
    """The attempt is claimed ``queued_s`` after the task's publication, and ends ``seconds`` after it."""
    outcome = how if how in ("succeeded", "cancelled") else "failed"
    end = end_of(of, "a", of.created_at + queued_s * S, outcome, of.created_at + seconds * S)
    mark = AttemptEvent(
        rollout_id=of.rollout_id, attempt_id="a", attempt=of.attempt, status="retry", worker_id="w", time=1, lease_s=1.0
    )
    return EVENTS, of.rollout_id, Decision(how, end, dead=dead, retry=Retry(of, mark, 0.0) if retry else None)


def test_ends_durations_retries_and_dead_letters_have_the_values_of_their_decisions():
    registry = CollectorRegistry()
    metrics, value = AdapterMetrics(registry), registry.get_sample_value
    first, record = task(mode="val"), LogRecord(EVENTS, 0, 0, "k", b"")
    letter = DeadLetter(
        topic="t.events", partition=0, offset=0, timestamp=1, role="adapter", reason="undecodable", error="e", time=1
    )
    decisions = [
        decided(task(mode="train"), "succeeded", queued_s=2, seconds=20),
        decided(task(mode="train"), "lost", queued_s=50, seconds=400, dead=[(record, "lost_attempts_exhausted", "x")]),
        decided(first, "timeout", queued_s=5, seconds=9, retry=True),
    ]
    metrics.committed(Transaction(decisions, [(EVENTS, 0, letter)]))
    second = replace(first, attempt=2)  # its claim is not the rollout's first
    metrics.committed(Transaction([decided(second, "succeeded", queued_s=30, seconds=40)]))
    metrics.aborted()
    metrics.late("late_span")

    assert value("millstream_rollouts_ended_total", {"mode": "train", "status": "succeeded"}) == 1
    assert value("millstream_rollouts_ended_total", {"mode": "train", "status": "failed"}) == 1
    assert value("millstream_rollouts_ended_total", {"mode": "val", "status": "succeeded"}) == 1
    assert value("millstream_rollouts_ended_total", {"mode": "val", "status": "failed"}) is None
    assert value("millstream_rollout_seconds_sum", {"mode": "train"}) == 420
    assert value("millstream_rollout_seconds_bucket", {"mode": "train", "le": "30.0"}) == 1
    assert value("millstream_rollout_seconds_sum", {"mode": "val"}) == 40
    assert value("millstream_queued_seconds_count", {"mode": "train"}) == 2
    assert value("millstream_queued_seconds_sum", {"mode": "train"}) == 52
    assert value("millstream_queued_seconds_sum", {"mode": "val"}) == 5
    assert value("millstream_retries_total", {"status": "timeout"}) == 1
    assert value("millstream_lost_attempts_total") == 1
    assert value("millstream_dead_letters_total", {"reason": "lost_attempts_exhausted"}) == 1
    assert value("millstream_dead_letters_total", {"reason": "undecodable"}) == 1
    assert value("millstream_transactions_aborted_total") == 1
    assert value("millstream_late_records_total", {"kind": "late_span"}) == 1
