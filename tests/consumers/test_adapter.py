"""The adapter over a log: everything ends once, whatever is on the topic and whoever is restarted."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from factories import call, event, reward, task

from millstream.consumers import adapter as adapter_module
from millstream.consumers.adapter import Adapter
from millstream.consumers.triplets import to_triplets
from millstream.pipeline.memory_log import MemoryLog
from millstream.producers.port import send_acknowledged
from millstream.schemas import codec
from millstream.schemas.log import LogRecord, Partition
from millstream.schemas.records import DeadLetter, RolloutEnd, RolloutTask, Triplet
from millstream.schemas.status import rollout_status
from millstream.schemas.topics import Topics, partition_of

TOPICS = Topics("t", partitions=4)


@pytest.fixture(params=[False, True], ids=["live", "encoded"])
def log(request):
    return MemoryLog(TOPICS, encode=request.param)


@asynccontextmanager
async def adapter_on(log, name="0", **options):
    adapter = Adapter(log, TOPICS, transactional_id=f"adapter-{name}", **options)
    stop = asyncio.Event()
    running = asyncio.create_task(adapter.run(stop))
    await asyncio.wait([running, asyncio.create_task(adapter.wait_ready())], return_when=asyncio.FIRST_COMPLETED)
    try:
        yield adapter
    finally:
        stop.set()
        await running


async def write(log, *values):
    producer = log.producer()
    for value in values:
        key = value.rollout_id if not isinstance(value, bytes) else "garbage"
        await send_acknowledged(producer, TOPICS.events, value, key=key)


class Reader:
    """Everything committed on a topic, as it comes."""

    def __init__(self, log, topic, partitions):
        self.consumer = log.consumer()
        self.partitions = [Partition(topic, n) for n in range(partitions)]
        self.found = []

    async def until(self, condition):
        if not self.consumer.assignment():
            await self.consumer.assign(self.partitions, "beginning")
        async with asyncio.timeout(10):
            while not condition(self.found):
                for record in await self.consumer.poll(100, 1.0):
                    assert isinstance(record, LogRecord)
                    self.found.append((record, codec.decode(record.value)))
        return [value for _, value in self.found]


def history(of, attempt="a", value=0.5):
    return (
        event(of, attempt, "preparing"),
        call(of, attempt, "1"),
        reward(of, attempt, value),
        event(of, attempt, "succeeded", span_counts={"agent": 1, "proxy": 1}),
    )


async def test_a_rollouts_triplets_come_before_its_one_end_on_the_partition_of_its_events(log):
    tasks = [task() for _ in range(20)]
    reader = Reader(log, TOPICS.triplets, 4)
    async with adapter_on(log):
        await write(log, *(record for of in tasks for record in history(of)))
        await reader.until(lambda found: sum(isinstance(v, RolloutEnd) for _, v in found) == 20)
    for of in tasks:
        mine = [(r, v) for r, v in reader.found if v.rollout_id == of.rollout_id]
        assert [type(v) for _, v in mine] == [Triplet, RolloutEnd]
        assert {r.partition.number for r, _ in mine} == {partition_of(of.rollout_id, 4)}
        assert mine[1][1].reward == 0.5


async def test_a_restart_repeats_no_decision(log):
    tasks = [task() for _ in range(10)]
    reader = Reader(log, TOPICS.triplets, 4)
    ends = lambda found: sum(isinstance(v, RolloutEnd) for _, v in found)  # noqa: E731
    async with adapter_on(log):
        await write(log, *(record for of in tasks[:5] for record in history(of)))
        await reader.until(lambda found: ends(found) == 5)
    async with adapter_on(log):
        await write(log, *(record for of in tasks[5:] for record in history(of)))
        await write(log, *history(tasks[0], attempt="again"))
        await write(log, *history(last := task()))
        await reader.until(lambda found: any(v.rollout_id == last.rollout_id for _, v in found) and ends(found) >= 11)
    assert ends(reader.found) == 11


async def test_two_adapters_share_the_work_and_end_each_rollout_once(log):
    tasks = [task() for _ in range(40)]
    reader = Reader(log, TOPICS.triplets, 4)
    async with adapter_on(log, "0"):
        await write(log, *(r for of in tasks[:20] for r in history(of)))
        async with adapter_on(log, "1"):
            await write(log, *(r for of in tasks[20:] for r in history(of)))
            await reader.until(lambda found: sum(isinstance(v, RolloutEnd) for _, v in found) >= 40)
    ended = [v.rollout_id for _, v in reader.found if isinstance(v, RolloutEnd)]
    assert sorted(ended) == sorted(of.rollout_id for of in tasks)


async def test_an_attempt_that_falls_silent_ends_as_failed(log):
    of = task(lease_s=0.2)
    reader = Reader(log, TOPICS.triplets, 4)
    async with adapter_on(log):
        await write(log, event(of, "a", "preparing"))
        (end,) = await reader.until(lambda found: len(found) == 1)
    assert (end.status, end.reason) == ("failed", "lost: no heartbeat for 0.2 s")


async def test_garbage_goes_to_the_dead_letter_topic_once_and_the_rest_goes_on():
    log = MemoryLog(TOPICS, encode=True)
    of = task()
    dead, ends = Reader(log, TOPICS.dead, 1), Reader(log, TOPICS.triplets, 4)
    for _ in range(2):  # a restarted adapter reads it again
        async with adapter_on(log):
            if not ends.found:
                await write(log, b"garbage", *history(of))
            await ends.until(lambda found: len(found) == 2)
            (letter,) = await dead.until(lambda found: len(found) >= 1)
    async with adapter_on(log):
        await write(log, *history(task()))
        await ends.until(lambda found: len(found) == 4)
    assert len(dead.found) == 1
    assert isinstance(letter, DeadLetter)
    assert (letter.value, letter.role, letter.reason) == (b"garbage", "adapter", "undecodable")
    assert "not Avro single-object encoding" in letter.error
    assert letter.topic == TOPICS.events


async def test_a_users_own_function_makes_the_triplets(log):
    from dataclasses import replace

    reader = Reader(log, TOPICS.triplets, 4)
    zero = lambda trace: [replace(t, reward=0.0) for t in to_triplets(trace)]  # noqa: E731
    async with adapter_on(log, to_triplets=zero):
        await write(log, *history(task()))
        triplet, end = await reader.until(lambda found: len(found) == 2)
    assert (triplet.reward, end.reward) == (0.0, 0.5)


async def test_an_attempt_that_failed_goes_back_to_its_tasks_and_the_next_one_ends_the_rollout(log):
    tasks = [task(max_attempts=2, priority="high") for _ in range(20)]
    again, events, ends = (
        Reader(log, TOPICS.tasks("high"), 4),
        Reader(log, TOPICS.events, 4),
        Reader(log, TOPICS.triplets, 4),
    )
    async with adapter_on(log) as adapter:
        for of in tasks:
            await write(log, event(of, "a", "preparing"), event(of, "a", "failed", state=b"s"))
        await again.until(lambda found: len(found) == 20)
    assert adapter.stats.retries == {"failed": 20}
    assert len({record.partition for record, _ in again.found}) == 4
    marks = await events.until(lambda found: sum(getattr(v, "status", "") == "retry" for _, v in found) == 20)
    assert rollout_status(v for v in marks if v.rollout_id == tasks[0].rollout_id) == "retrying"
    async with adapter_on(log) as adapter:  # the successor doesn't make them again
        for _, of in again.found:
            assert (of.attempt, of.losses, of.state) == (2, 0, b"s")
            await write(log, *history(of, attempt="b"))
        await write(log, *(event(of, "a", "succeeded") for of in tasks))
        found = await ends.until(lambda found: sum(isinstance(v, RolloutEnd) for _, v in found) == 20)
        await write(log, event(last := task(), "z", "preparing"), event(last, "z", "cancelled"))
        await ends.until(lambda found: found[-1][1].rollout_id == last.rollout_id)
    assert {(v.status, v.attempts) for v in found if isinstance(v, RolloutEnd)} == {("succeeded", 2)}
    assert len(log.partitions[TOPICS.tasks("high")][0].records) < 20
    assert sum(r is not None for p in log.partitions[TOPICS.tasks("high")] for r in p.records) == 20
    assert (adapter.stats.ended, adapter.stats.retries, adapter.stats.zombie_results_ignored) == (21, {}, 20)


async def test_a_task_that_kills_its_runners_ends_as_one_dead_letter(log):
    of = task(max_losses=2, lease_s=0.1)
    again, dead, ends = (
        Reader(log, TOPICS.tasks("normal"), 4),
        Reader(log, TOPICS.dead, 1),
        Reader(log, TOPICS.triplets, 4),
    )
    async with adapter_on(log) as adapter:
        await write(log, event(of, "a1", "preparing"))
        for attempt in (2, 3):
            *_, of = await again.until(lambda found, n=attempt: len(found) == n - 1)
            await write(log, event(of, f"a{attempt}", "preparing"))
        (end,) = await ends.until(lambda found: len(found) == 1)
    assert (end.status, end.attempts, end.losses) == ("failed", 3, 3)
    (letter,) = await dead.until(lambda found: len(found) == 1)
    assert (letter.reason, letter.error) == ("losses_exhausted", "lost: no heartbeat for 0.1 s")
    assert codec.decode_as(RolloutTask, letter.value) == of
    assert (adapter.stats.losses, adapter.stats.retries, adapter.stats.dead_letters) == (3, {"lost": 2}, 1)
    async with adapter_on(log):  # a restart reads it all again
        await write(log, event(last := task(), "z", "preparing"), event(last, "z", "cancelled"))
        await ends.until(lambda found: len(found) == 2)
    assert len([r for r in log.partitions[TOPICS.dead][0].records if r is not None]) == 1


async def test_when_memory_runs_out_the_largest_attempt_fails_and_the_others_go_on(log, monkeypatch):
    monkeypatch.setattr(adapter_module, "PROCESS_BYTES", 20_000)
    large, small = task(), task()
    ends = Reader(log, TOPICS.triplets, 4)
    async with adapter_on(log):
        await write(log, event(small, "s", "preparing"), event(large, "l", "preparing"))
        await write(log, *(reward(large, "l", 0.0) for _ in range(100)))
        (end,) = await ends.until(lambda found: len(found) == 1)
        await write(log, event(large, "l", "succeeded", span_counts={"agent": 100}))
        await write(log, *history(small, attempt="s")[1:])
        await ends.until(lambda found: len(found) == 3)
    assert (end.rollout_id, end.status) == (large.rollout_id, "failed")
    assert end.reason.startswith("failed: too_large: ")
    assert ends.found[-1][1].status == "succeeded"
