"""The adapter over a log: every rollout ends once, whatever is on the topic and whichever process restarts."""

from dataclasses import replace
from itertools import chain

import pytest
from adapter_rig import Reader, adapter_on, counted, history, write
from factories import event, reward, task
from prometheus_client import CollectorRegistry

from millstream.consumers.adapter.adapter import AdapterPolicy
from millstream.consumers.adapter.triplets import to_triplets
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import DeadLetter, RolloutEnd, RolloutTask, Triplet
from millstream.schemas.wire.status import rollout_status
from millstream.schemas.wire.topics import partition_of


async def test_a_rollouts_triplets_come_before_its_one_end_on_the_partition_of_its_events(bed):
    tasks = [task() for _ in range(20)]
    reader = Reader(bed, bed.topics.triplets)
    async with adapter_on(bed):
        await write(bed, *(record for of in tasks for record in history(of)))
        await reader.until(lambda found: sum(isinstance(v, RolloutEnd) for _, v in found) == 20)
    for of in tasks:
        mine = [(r, v) for r, v in reader.found if v.rollout_id == of.rollout_id]
        assert [type(v) for _, v in mine] == [Triplet, RolloutEnd]
        assert {r.partition.number for r, _ in mine} == {partition_of(of.rollout_id, 4)}
        assert mine[1][1].reward == 0.5


async def test_a_restart_repeats_no_decision(bed):
    tasks = [task() for _ in range(10)]
    reader = Reader(bed, bed.topics.triplets)
    ends = lambda found: sum(isinstance(v, RolloutEnd) for _, v in found)  # noqa: E731
    async with adapter_on(bed):
        await write(bed, *(record for of in tasks[:5] for record in history(of)))
        await reader.until(lambda found: ends(found) == 5)
    async with adapter_on(bed):
        await write(bed, *(record for of in tasks[5:] for record in history(of)))
        await write(bed, *history(tasks[0], attempt="again"))
        await write(bed, *history(last := task()))
        await reader.until(lambda found: any(v.rollout_id == last.rollout_id for _, v in found) and ends(found) >= 11)
    assert ends(reader.found) == 11


@pytest.mark.parametrize("bed", [pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True)
async def test_two_adapters_share_the_work_and_end_each_rollout_once(bed):
    tasks = [task() for _ in range(40)]
    reader = Reader(bed, bed.topics.triplets)
    async with adapter_on(bed, "0"):
        await write(bed, *(r for of in tasks[:20] for r in history(of)))
        async with adapter_on(bed, "1"):
            await write(bed, *(r for of in tasks[20:] for r in history(of)))
            await reader.until(lambda found: sum(isinstance(v, RolloutEnd) for _, v in found) >= 40)
    ended = [v.rollout_id for _, v in reader.found if isinstance(v, RolloutEnd)]
    assert sorted(ended) == sorted(of.rollout_id for of in tasks)


async def test_an_attempt_without_heartbeats_ends_as_failed(bed):
    of = task(lease_s=0.2)
    reader = Reader(bed, bed.topics.triplets)
    async with adapter_on(bed):
        await write(bed, event(of, "a", "preparing"), event(of, "a", "running"))
        (end,) = await reader.until(lambda found: len(found) == 1)
    assert (end.status, end.reason) == ("failed", "lost: no heartbeat for 0.2 s")


async def test_garbage_goes_to_the_dead_letter_topic_once_and_the_rest_goes_on(bed):
    of = task()
    dead, ends = Reader(bed, bed.topics.dead, 1), Reader(bed, bed.topics.triplets)
    for _ in range(2):  # a restarted adapter reads it again
        async with adapter_on(bed):
            if not ends.found:
                await write(bed, b"garbage", *history(of))
            await ends.until(lambda found: len(found) == 2)
            (letter,) = await dead.until(lambda found: len(found) >= 1)
    async with adapter_on(bed):
        await write(bed, *history(task()))
        await ends.until(lambda found: len(found) == 4)
    assert len(dead.found) == 1
    assert isinstance(letter, DeadLetter)
    assert (letter.value, letter.role, letter.reason) == (b"garbage", "adapter", "undecodable")
    assert "not Avro single-object encoding" in letter.error
    assert letter.topic == bed.topics.events


async def test_a_users_own_function_makes_the_triplets(bed):
    reader = Reader(bed, bed.topics.triplets)
    zero = lambda trace: [replace(t, reward=0.0) for t in to_triplets(trace)]  # noqa: E731
    async with adapter_on(bed, to_triplets=zero):
        await write(bed, *history(task()))
        triplet, end = await reader.until(lambda found: len(found) == 2)
    assert (triplet.reward, end.reward) == (0.0, 0.5)


async def test_a_failed_attempt_is_retried_and_the_next_one_ends_the_rollout(bed):
    tasks = [task(max_attempts=2, priority="high", rollout_id=f"rollout-{n}") for n in range(20)]
    again, events, ends = (
        Reader(bed, bed.topics.tasks("high")),
        Reader(bed, bed.topics.events),
        Reader(bed, bed.topics.triplets),
    )
    registry = CollectorRegistry()
    async with adapter_on(bed, registry=registry):
        firsts = [(event(of, "a", "preparing"), event(of, "a", "failed", state=b"s")) for of in tasks]
        await write(bed, *chain(*firsts))
        await again.until(lambda found: len(found) == 20)
    assert counted(registry, "retries", "status") == {"failed": 20}
    assert len({record.partition for record, _ in again.found}) == 4
    marks = await events.until(lambda found: sum(getattr(v, "status", "") == "retry" for _, v in found) == 20)
    assert rollout_status(v for v in marks if v.rollout_id == tasks[0].rollout_id) == "retrying"
    registry = CollectorRegistry()
    async with adapter_on(bed, registry=registry):  # the successor does not retry them again
        assert {(of.attempt, of.lost_attempts, of.state) for _, of in again.found} == {(2, 0, b"s")}
        await write(bed, *chain(*(history(of, attempt="b") for _, of in again.found)))
        await write(bed, *(event(of, "a", "succeeded") for of in tasks))
        found = await ends.until(lambda found: sum(isinstance(v, RolloutEnd) for _, v in found) == 20)
        await write(bed, event(last := task(), "z", "preparing"), event(last, "z", "cancelled"))
        await ends.until(lambda found: found[-1][1].rollout_id == last.rollout_id)
    assert {(v.status, v.attempts) for v in found if isinstance(v, RolloutEnd)} == {("succeeded", 2)}
    assert len(await again.rest()) == 20
    assert counted(registry, "rollouts_ended", "mode", "status") == {
        ("train", "succeeded"): 20,
        ("train", "cancelled"): 1,
    }
    assert counted(registry, "retries", "status") == {}
    assert counted(registry, "late_records", "kind")["zombie_result"] == 20


async def test_a_task_that_kills_its_runners_ends_as_one_dead_letter(bed):
    of = task(max_lost_attempts=2, lease_s=0.1)
    again, dead, ends = (
        Reader(bed, bed.topics.tasks("normal")),
        Reader(bed, bed.topics.dead, 1),
        Reader(bed, bed.topics.triplets),
    )
    registry = CollectorRegistry()
    async with adapter_on(bed, registry=registry):
        await write(bed, event(of, "a1", "preparing"), event(of, "a1", "running"))
        for attempt in (2, 3):
            *_, of = await again.until(lambda found, n=attempt: len(found) == n - 1)
            await write(bed, event(of, f"a{attempt}", "preparing"), event(of, f"a{attempt}", "running"))
        (end,) = await ends.until(lambda found: len(found) == 1)
    assert (end.status, end.attempts, end.lost_attempts) == ("failed", 3, 3)
    (letter,) = await dead.until(lambda found: len(found) == 1)
    assert (letter.reason, letter.error) == ("lost_attempts_exhausted", "lost: no heartbeat for 0.1 s")
    assert codec.decode_as(RolloutTask, letter.value) == of
    assert counted(registry, "lost_attempts") == {(): 3}
    assert counted(registry, "retries", "status") == {"lost": 2}
    assert counted(registry, "dead_letters", "reason") == {"lost_attempts_exhausted": 1}
    async with adapter_on(bed):  # a restart reads it all again
        await write(bed, event(last := task(), "z", "preparing"), event(last, "z", "cancelled"))
        await ends.until(lambda found: len(found) == 2)
    assert len(await dead.rest()) == 1


async def test_when_memory_runs_out_the_largest_attempt_fails_and_the_others_go_on(bed):
    large, small = task(), task()
    ends = Reader(bed, bed.topics.triplets)
    async with adapter_on(bed, policy=AdapterPolicy(process_bytes=20_000)):
        await write(bed, event(small, "s", "preparing"), event(large, "l", "preparing"))
        await write(bed, *(reward(large, "l", 0.0) for _ in range(100)))
        (end,) = await ends.until(lambda found: len(found) == 1)
        await write(bed, event(large, "l", "succeeded", span_counts={"agent": 100}))
        await write(bed, *history(small, attempt="s")[1:])
        await ends.until(lambda found: len(found) == 3)
    assert (end.rollout_id, end.status) == (large.rollout_id, "failed")
    assert end.reason.startswith("failed: too_large: ")
    assert ends.found[-1][1].status == "succeeded"
