"""What the adapter counts, and when: each decision once, with the values that its end holds."""

import asyncio
import time
from dataclasses import replace

from adapter_rig import Bed, Reader, adapter_on, history, write
from exposition import checked, text_of
from factories import event, task
from prometheus_client import CollectorRegistry

from millstream.consumers.adapter.decision import Decision, Retry, end_of
from millstream.consumers.adapter.metrics import AdapterMetrics
from millstream.consumers.adapter.transaction import Transaction
from millstream.consumers.log.memory_log import MemoryLog
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, DeadLetter, RolloutEnd
from millstream.schemas.wire.topics import Topics

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
    metrics.committed(Transaction(decisions, [(EVENTS, 0, letter)]), 0.02)
    second = replace(first, attempt=2)  # its claim is not the rollout's first
    metrics.committed(Transaction([decided(second, "succeeded", queued_s=30, seconds=40)]), 2.0)
    foreign = task(mode="a-mode-of-its-own")
    metrics.committed(Transaction([decided(foreign, "succeeded", queued_s=1, seconds=1)]), 0.5)
    metrics.aborted()
    metrics.reduced()
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
    assert value("millstream_dead_letters_total", {"role": "adapter", "reason": "lost_attempts_exhausted"}) == 1
    assert value("millstream_dead_letters_total", {"role": "adapter", "reason": "undecodable"}) == 1
    assert value("millstream_rollouts_ended_total", {"mode": "other", "status": "succeeded"}) == 1
    assert value("millstream_transactions_total", {"result": "committed"}) == 3
    assert value("millstream_transactions_total", {"result": "aborted"}) == 1
    assert value("millstream_transactions_total", {"result": "reduced"}) == 1
    assert value("millstream_transaction_seconds_sum") == 2.52
    assert value("millstream_transaction_seconds_bucket", {"le": "0.03"}) == 1
    assert value("millstream_late_records_total", {"kind": "late_span"}) == 1


async def test_an_adapter_that_starts_again_counts_only_what_it_decides_itself():
    """Defect 4: what is read again is not counted again, however many processes have read it."""
    topics = Topics("t", 4)
    bed = Bed(MemoryLog(topics), topics)
    reader = Reader(bed, topics.triplets)
    registries = [CollectorRegistry(), CollectorRegistry()]
    for registry, rollouts in zip(registries, (5, 3), strict=True):
        async with adapter_on(bed, registry=registry):
            before = len(reader.found)
            await write(bed, *(record for _ in range(rollouts) for record in history(task())))
            ends = lambda found: sum(isinstance(v, RolloutEnd) for _, v in found[before:])  # noqa: B023, E731
            await reader.until(lambda found: ends(found) == rollouts)  # noqa: B023
    labels = {"mode": "train", "status": "succeeded"}
    assert [r.get_sample_value("millstream_rollouts_ended_total", labels) for r in registries] == [5, 3]
    for registry in registries:
        checked(text_of(registry))


async def test_the_lag_is_the_age_of_what_is_not_folded_yet():
    topics = Topics("t", 1)
    bed = Bed(MemoryLog(topics), topics)
    async with adapter_on(bed) as adapter:
        of = task()
        await write(bed, event(of, "a", "preparing"))
        async with asyncio.timeout(10):
            while not (adapter.open_rollouts and adapter.idle):  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert adapter.lag_s == adapter.lag_records == 0
        (part,) = adapter._parts.values()
        part.high_watermark, part.read_ms = 100, round(time.time() * 1000) - 7000
        assert 6.99 < adapter.lag_s < 9
        assert adapter.lag_records == 100 - part.position
