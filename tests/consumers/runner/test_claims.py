"""Claims: which tasks get the free slots, and what is written in which order."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from factories import task
from runner_rig import Rig, settings_for_tests

from millstream.consumers.control import ControlFollower
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.claims import Claim, ClaimPolicy, Claims
from millstream.producers.control import pause_record, publish_control, publish_resources
from millstream.producers.log.port import Producer
from millstream.schemas.control import Resources
from millstream.schemas.errors import LogError, LogUnavailable, TransactionAborted
from millstream.schemas.ids import derived_id, new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import DeadLetter, RolloutTask

SETTINGS = settings_for_tests()
TOPICS = SETTINGS.topics


@asynccontextmanager
async def claiming(log: Any, **policy: float) -> AsyncIterator[Claims]:
    control = ControlFollower(log, TOPICS)
    claims = Claims(log, TOPICS, log.producer(), control, "w", ClaimPolicy(**policy))
    await control.start()
    await claims.start()
    yield claims
    await claims.close()
    await control.close()


async def all_events(log: MemoryLog, topic: str) -> list[Any]:
    consumer = log.consumer()
    await consumer.assign([Partition(topic, n) for n in range(len(log.partitions[topic]))])
    return [codec.decode(r.value) for r in await consumer.poll(1000, 0.01) if isinstance(r, LogRecord)]


async def test_with_a_backlog_everywhere_low_never_starves() -> None:
    log = MemoryLog(TOPICS)
    await Rig(log, SETTINGS).publish_tasks([task(priority=p) for p in ("high", "normal", "low") for _ in range(60)])
    taken: Counter[str] = Counter()
    async with claiming(log) as claims:
        for slots in (1,) * 13 + (5,) * 13:
            got = await claims.claim(slots, 1.0)
            assert len(got) == slots
            taken.update(claim.task.priority for claim in got)
            if sum(taken.values()) == 13:
                assert taken == {"high": 8, "normal": 4, "low": 1}
    assert taken == {"high": 48, "normal": 24, "low": 6}


async def test_slots_that_one_priority_leaves_go_to_the_others() -> None:
    log = MemoryLog(TOPICS)
    await Rig(log, SETTINGS).publish_tasks([task(priority="low") for _ in range(20)])
    async with claiming(log) as claims:
        assert len(await claims.claim(16, 1.0)) == 16
        assert len(await claims.claim(16, 1.0)) == 4
        assert await claims.claim(16, 0.01) == []


async def test_a_claim_waits_for_a_task_and_takes_no_more_than_its_slots() -> None:
    log = MemoryLog(TOPICS)
    async with claiming(log) as claims:
        publishing = Rig(log, SETTINGS).publish_tasks([task() for _ in range(5)])
        asyncio.get_running_loop().call_later(0.05, asyncio.ensure_future, publishing)
        assert len(await claims.claim(2, 30.0)) == 2


class DeafLog(MemoryLog):
    """Its runner's consumer polls and gets nothing while ``deaf``."""

    deaf = True

    def consumer(self, group: str | None = None, **options: Any) -> Any:
        consumer = super().consumer(group, **options)
        poll = consumer.poll

        async def maybe(max_records: int, timeout_s: float, topics: Any = None) -> Any:
            return await poll(max_records, timeout_s, () if self.deaf and group is not None else topics)

        consumer.poll = maybe
        return consumer


async def test_a_consumer_that_gets_nothing_while_its_lag_grows_starves() -> None:
    log = DeafLog(TOPICS)
    rig = Rig(log, SETTINGS)
    async with claiming(log, lag_check_s=0.0) as claims:
        for n in range(3):  # the first look is at partitions that have just been assigned
            await rig.publish([n])
            assert await claims.claim(1, 0.01) == []
        assert claims.starvation.seconds > 0
        await claims.stay(0)  # no slot is free: nothing is missed
        assert claims.starvation.seconds == 0
        for n in range(2):
            await rig.publish([n])
            assert await claims.claim(1, 0.01) == []
        assert claims.starvation.seconds > 0
        log.deaf = False
        assert len(await claims.claim(1, 1.0)) == 1
        assert claims.starvation.seconds == 0


async def test_paused_tasks_are_not_starvation() -> None:
    log = MemoryLog(TOPICS)
    rig, control = Rig(log, SETTINGS), log.producer()
    await publish_control(control, TOPICS, pause_record("held", True))
    async with claiming(log, lag_check_s=0.0) as claims:
        for n in range(12):
            await rig.publish([n], "held")
            assert await claims.claim(8, 0.01) == []
        assert claims.starvation.seconds == 0


class SpyLog:
    """A log whose runner's consumer records its commits, or fails them."""

    def __init__(self, inner: MemoryLog, failure: Exception | None = None) -> None:
        self.inner = inner
        self.failure = failure
        self.committed: list[tuple[Mapping[Partition, int], int]] = []  # offsets, events on the log by then

    def producer(self) -> Producer:
        return self.inner.producer()

    def consumer(self, group: str | None = None, **options: Any) -> Any:
        consumer = self.inner.consumer(group, **options)
        if group is not None:
            commit = consumer.commit

            async def spied(offsets: Mapping[Partition, int], timeout_s: float = 10.0) -> None:
                self.committed.append((offsets, len(await all_events(self.inner, TOPICS.events))))
                if self.failure is not None:
                    raise self.failure
                await commit(offsets, timeout_s)

            consumer.commit = spied  # type: ignore[method-assign]
        return consumer


async def test_preparing_with_the_task_is_on_the_log_before_the_commit() -> None:
    log = SpyLog(MemoryLog(TOPICS))
    tasks = [task(attempt=2) for _ in range(3)]
    await Rig(log.inner, SETTINGS).publish_tasks(tasks)
    async with claiming(log) as claims:
        got = await claims.claim(8, 1.0)
    assert [n for _, n in log.committed] == [3]  # one commit for the three, behind all of them
    events = await all_events(log.inner, TOPICS.events)
    assert {(e.rollout_id, e.attempt_id, e.attempt, e.status, e.worker_id) for e in events} == {
        (c.task.rollout_id, c.attempt_id, 2, "preparing", "w") for c in got
    }
    assert sorted(codec.decode_as(RolloutTask, e.task).rollout_id for e in events) == sorted(
        t.rollout_id for t in tasks
    )


@pytest.mark.parametrize("failure", [TransactionAborted("the partition is lost"), LogUnavailable("no answer")])
async def test_tasks_whose_commit_failed_or_has_an_unknown_outcome_are_read_and_committed_again(
    failure: Exception,
) -> None:
    """Entry C1: else the old offset could stay for days, and the task would come back then."""
    log = SpyLog(MemoryLog(TOPICS), failure)
    await Rig(log.inner, SETTINGS).publish_tasks(tasks := [task(), task()])
    async with claiming(log) as claims:
        assert await claims.claim(8, 1.0) == []
        log.failure = None
        got = await claims.claim(8, 1.0)
    assert {c.task.rollout_id for c in got} == {t.rollout_id for t in tasks}
    assert log.committed[1][0] == log.committed[0][0]
    assert [e.status for e in await all_events(log.inner, TOPICS.events)] == ["preparing"] * 4


async def test_a_runner_that_was_frozen_after_its_poll_claims_nothing_of_it() -> None:
    """Entry C1: the group may have given the tasks to another runner meanwhile."""
    log = SpyLog(MemoryLog(TOPICS))
    await Rig(log.inner, SETTINGS).publish_tasks([task()])
    async with claiming(log, session_s=-1.0) as claims:
        assert await claims.claim(8, 1.0) == []
    assert (log.committed, await all_events(log.inner, TOPICS.events)) == ([], [])
    async with claiming(log) as claims:
        assert len(await claims.claim(8, 1.0)) == 1


async def refused_by(log: Any, **policy: float) -> Claim:
    async with claiming(log, **policy) as claims:
        (claim,) = await claims.claim(8, 1.0)
    assert claim.refused is not None
    assert claim.refused.error is not None
    return claim


async def test_a_task_too_large_to_be_claimed_is_ended_with_the_reason() -> None:
    """Entry C2: `preparing` holds the task and some bytes more."""
    log = MemoryLog(TOPICS, encode=True, max_record_bytes=SETTINGS.max_record_bytes)
    large = task(input="x" * (SETTINGS.max_record_bytes - 250))
    log.producer().send(TOPICS.tasks("normal"), large)
    claim = await refused_by(log)
    assert (claim.task.rollout_id, claim.task.input) == (large.rollout_id, "")
    assert (claim.refused.status, claim.refused.error.type) == ("failed", "too_large")
    assert claim.refused.metadata == {"retry": "refused"}
    (letter,) = await all_events(log, TOPICS.dead)
    assert (letter.reason, letter.topic) == ("too_large", TOPICS.tasks("normal"))


@pytest.mark.parametrize("body", [b"\xc3\x01" + b"newer..." + b"body", b"", b"garbage", codec.encode(task())[:-5]])
async def test_a_task_that_cannot_be_read_is_ended_if_its_header_names_the_rollout(body: bytes) -> None:
    """Entry C2: for example a newer schema, while a deployment is upgraded."""
    log = MemoryLog(TOPICS)
    log.producer().send(TOPICS.tasks("normal"), body, headers={"rollout": b"0190-x"})
    claim = await refused_by(log)
    assert (claim.task.rollout_id, claim.refused.error.type) == ("0190-x", "undecodable")
    (letter,) = await all_events(log, TOPICS.dead)
    assert (letter.reason, letter.value) == ("undecodable", body)
    assert {e.rollout_id for e in await all_events(log, TOPICS.events)} == {"0190-x"}


@pytest.mark.parametrize("paused", [False, True])
async def test_a_task_that_waited_too_long_is_ended_before_the_log_drops_it(paused: bool) -> None:
    """Entry C2: a pause, or no runner, for longer than the topic's retention."""
    log = MemoryLog(TOPICS)
    if paused:
        await publish_control(log.producer(), TOPICS, pause_record("held", True))
    of = task(experiment_id="held", rollout_id="without-a-time")
    await Rig(log, SETTINGS).publish_tasks([of])
    async with claiming(log, task_s=0.3) as claims:
        if paused:
            assert await claims.claim(8, 0.0) == []
        got: list[Claim] = []
        async with asyncio.timeout(10):
            await asyncio.sleep(0.3)
            while not got:
                got = await claims.claim(8, 0.1)
    (claim,) = got
    assert claim.refused is not None
    assert claim.refused.error is not None
    assert (claim.task, claim.refused.error.type, claim.refused.metadata) == (of, "expired", {"retry": "no"})


async def test_a_rollout_that_is_too_old_by_its_id_is_ended() -> None:
    """Entry C2: retried for days, or published again."""
    log = MemoryLog(TOPICS)
    log.producer().send(TOPICS.tasks("normal"), task(rollout_id=derived_id(time.time_ns() - 7 * 86_400 * 10**9)))
    assert (await refused_by(log)).refused.error.type == "expired"


async def test_an_undecodable_task_goes_to_dead_and_the_others_run() -> None:
    log = MemoryLog(TOPICS)
    producer = log.producer()
    producer.send(TOPICS.tasks("normal"), b"garbage", partition=0)
    good = task()
    producer.send(TOPICS.tasks("normal"), good, partition=0)
    async with claiming(log) as claims:
        assert [c.task.rollout_id for c in await claims.claim(8, 1.0)] == [good.rollout_id]
        (letter,) = await all_events(log, TOPICS.dead)
        assert isinstance(letter, DeadLetter)
        assert (letter.topic, letter.offset, letter.value) == (TOPICS.tasks("normal"), 0, b"garbage")
        assert (letter.role, letter.reason) == ("runner", "undecodable")
    async with claiming(log) as successor:
        assert await successor.claim(8, 0.01) == []


async def test_resources_are_the_pinned_or_the_latest_of_the_experiment() -> None:
    log = MemoryLog(TOPICS)
    versions = [Resources(resources_id=derived_id(n * 10**9), experiment_id="e", items={"n": {"v": n}}) for n in (1, 2)]
    async with claiming(log) as claims:
        for resources in versions:  # published after the runner's start: it has to catch up
            await publish_resources(log.producer(), TOPICS, resources)
        tasks = {
            "pinned": task(experiment_id="e", resources_id=versions[0].resources_id),
            "latest": task(experiment_id="e"),
            "other": task(experiment_id="o"),
            "missing": task(experiment_id="e", resources_id=new_id()),
        }
        await Rig(log, SETTINGS).publish_tasks([tasks["pinned"]])
        pinned = await claims.claim(1, 1.0)  # by now all of them are read
        await Rig(log, SETTINGS).publish_tasks([t for name, t in tasks.items() if name != "pinned"])
        got = {c.task.rollout_id: c for c in pinned + await claims.claim(8, 1.0)}
    assert got[tasks["pinned"].rollout_id].resources == versions[0]
    latest = got[tasks["latest"].rollout_id]
    assert (latest.resources, latest.task.resources_id) == (versions[1], versions[1].resources_id)
    other = got[tasks["other"].rollout_id]
    assert other.resources is not None
    assert (other.resources.items, other.task.resources_id) == ({}, None)
    assert got[tasks["missing"].rollout_id].resources is None


async def test_tasks_that_came_before_an_error_of_the_log_are_claimed() -> None:
    """They are not handed out again: without this they would be skipped for good."""
    log = MemoryLog(TOPICS)
    await Rig(log, SETTINGS).publish_tasks([task(priority="high")])
    async with claiming(log) as claims:
        poll, polled = claims._consumer.poll, 0

        async def failing(*args: Any) -> Any:
            nonlocal polled
            polled += 1
            if polled == 2:
                raise LogError("denied")
            return await poll(*args)

        claims._consumer.poll = failing  # type: ignore[method-assign]
        assert len(await claims.claim(3, 0.1)) == 1
        assert polled == 2


async def test_a_refusal_at_the_start_ends_the_runner_and_a_later_one_is_sat_out() -> None:
    log = MemoryLog(TOPICS)

    async def denied(*args: Any) -> Any:
        with claims._consumer.polls:
            raise LogError("denied")

    async with claiming(log, retry_s=0.0) as claims:
        poll, claims._consumer.poll = claims._consumer.poll, denied  # type: ignore[method-assign]
        with pytest.raises(LogError, match="denied"):
            await claims.claim(1, 0.0)
        claims._consumer.poll = poll  # type: ignore[method-assign]
        assert await claims.claim(1, 0.0) == []
        claims._consumer.poll = denied  # type: ignore[method-assign]
        assert await claims.claim(1, 0.0) == []
        await claims.stay(0.0)
