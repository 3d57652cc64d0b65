"""Claiming tasks: poll, write ``preparing``, wait for its acknowledgement, commit, and only then run.

Once claimed, an attempt lives in the log and does not depend on Kafka's redelivery: a rebalance re-runs nothing. If the
commit fails, or its outcome is unknown, none of the tasks is run: those of partitions that are still assigned are read
and claimed again, the others by their new owner. Tasks that were polled longer ago than the group's session are not
claimed either: another runner may have them. Whatever is claimed twice all the same ends once (ARCHITECTURE.md,
"Exactly once").

A partition is read in order and has one committed offset, so a task of a paused experiment can't be skipped: it blocks
its partition, with all that follows, until the experiment is resumed. After a rebalance the new owner reads it again.
An experiment that must not wait for another needs its own topic_prefix.

A task that can't be run is claimed and ended as failed: one that is too old (the log would drop it unread), one whose
claim would be too large, and one that can't be decoded, if its header names the rollout.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from millstream.consumers.control import ControlFollower
from millstream.consumers.dead_letters import dead_letter, send_dead_letter
from millstream.consumers.log.kafka_policy import ConsumerPolicy
from millstream.consumers.log.port import Consumer, Log
from millstream.consumers.runner.fairness import WeightedTurns
from millstream.consumers.runner.outcome import Outcome, stopped_by
from millstream.consumers.runner.starvation import Starvation
from millstream.producers.log.acks import Acks
from millstream.producers.log.port import Producer
from millstream.producers.tasks import expired, unreadable_task
from millstream.schemas.control import Resources
from millstream.schemas.errors import CodecError, LogError, TooLarge
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import KIND_HEADER, ROLLOUT_HEADER, LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutTask
from millstream.schemas.wire.topics import LIFETIMES, PRIORITIES, Topics

logger = logging.getLogger(__name__)

ROLE: Final = "runner"


@dataclass(frozen=True, slots=True)
class ClaimPolicy:
    retry_s: float = 1.0  # before the next claim after the log refused one
    lag_check_s: float = 10.0  # between two looks at the lag, while slots are free and no tasks arrive
    # After which the group gives our partitions to another runner.
    session_s: float = ConsumerPolicy().session_ms / 1000
    task_s: float = LIFETIMES.task_s  # age of a task, or of a rollout by its id, from which it is ended unrun


@dataclass(frozen=True, slots=True)
class Claim:
    """A task that this runner runs. ``resources`` is None if the version that it is pinned to does not exist."""

    task: RolloutTask
    attempt_id: str
    resources: Resources | None
    refused: Outcome | None = None  # why it can't be run: it is ended so


def preparing(task: RolloutTask, attempt_id: str, worker_id: str) -> AttemptEvent:
    """The first record of an attempt."""
    return AttemptEvent(
        rollout_id=task.rollout_id,
        attempt_id=attempt_id,
        attempt=task.attempt,
        status=status.PREPARING,
        worker_id=worker_id,
        time=time.time_ns(),
        lease_s=task.lease_s,
        task=codec.encode(task),
    )


def _refused(reason: str, message: str) -> Outcome:
    """The outcome of a task for which the runner has written a dead letter."""
    return replace(stopped_by(status.FAILED, reason, message), metadata={"retry": status.RETRY_REFUSED})


class Claims:
    """The runner's consumer of the tasks topics."""

    def __init__(
        self,
        log: Log,
        topics: Topics,
        producer: Producer,
        control: ControlFollower,
        worker_id: str,
        policy: ClaimPolicy = ClaimPolicy(),
        *,
        on_dead_letter: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        """``on_dead_letter`` is called with the reason of each."""
        self._on_dead_letter = on_dead_letter
        self._topics = topics
        self._producer = producer
        self._control = control
        self._worker_id = worker_id
        self._policy = policy
        self._turns = WeightedTurns()
        self._held: dict[Partition, tuple[LogRecord, RolloutTask]] = {}  # blocked by a paused experiment's task
        self._lag_checked = time.monotonic()
        self._assigned: frozenset[Partition] = frozenset()
        self.starvation = Starvation()
        self._consumer: Consumer = log.consumer(f"{topics.prefix}.runner")

    async def start(self) -> None:
        await self._consumer.subscribe([self._topics.tasks(priority) for priority in PRIORITIES])

    async def close(self) -> None:
        await self._consumer.close()

    async def claim(self, slots: int, timeout_s: float) -> list[Claim]:
        """Claims up to ``slots`` (at least 1) tasks. Returns once there are any, or none after ``timeout_s``."""
        try:
            released = [partition for partition, held in self._held.items() if not self._waits(*held)]
            self._consumer.resume(released)
            for partition in released:
                del self._held[partition]
            records = self._still_held(await self._poll(slots, timeout_s))
            polled = time.monotonic()
            if records or released:
                self.starvation.reset()
            elif time.monotonic() - self._lag_checked > self._policy.lag_check_s:
                await self._check_lag()
            if self._control.pauses:
                records = await self._hold_back(records)
            return await self._claim(records, polled) if records else []
        except LogError as error:
            text = "no tasks can be claimed, retrying: %s"
            await self._consumer.polls.sit_out(error, logger.warning, text, self._policy.retry_s)
            self.starvation.reset()
            return []

    async def stay(self, timeout_s: float) -> None:
        """Stays in the group while there is no free slot, and takes nothing."""
        self.starvation.reset()
        try:
            await self._consumer.poll(1, timeout_s, ())
        except LogError as error:
            text = "the log does not answer: %s"
            await self._consumer.polls.sit_out(error, logger.warning, text, self._policy.retry_s)

    async def _check_lag(self) -> None:
        self._lag_checked = time.monotonic()
        assigned = self._consumer.assignment()
        if assigned != self._assigned:
            self._assigned = assigned
            self.starvation.reset()
        ends = await self._consumer.end_offsets(assigned - self._held.keys())
        # Just after a rebalance a position is unknown: the lag then seems large for a moment.
        self.starvation.observe(sum(end - (self._consumer.position(partition) or 0) for partition, end in ends.items()))

    async def _poll(self, slots: int, timeout_s: float) -> list[LogRecord]:
        records: list[LogRecord] = []
        try:
            await self._poll_now(slots, records)
            if not records:
                # One record at most: those that arrived with it are then shared by weight again.
                records += await self._consumer.poll(1, timeout_s)
                if records and slots > 1:
                    await self._poll_now(slots - 1, records)
        except LogError:
            if not records:
                raise
            # Those that were handed out have to be claimed: they are not handed out again.
        return records

    async def _poll_now(self, slots: int, found: list[LogRecord]) -> None:
        """Adds up to ``slots`` records, by weight. What one priority leaves goes to the others, high first."""
        most = len(found) + slots
        backlog: list[str] = []  # topics that may have more
        for priority, share in self._turns.take(slots).items():
            topic = self._topics.tasks(priority)
            got = await self._consumer.poll(share, 0, [topic]) if share else []
            found += got
            if len(got) == share:
                backlog.append(topic)
        for topic in backlog:
            if len(found) < most:
                found += await self._consumer.poll(most - len(found), 0, [topic])

    def _still_held(self, records: Sequence[LogRecord]) -> list[LogRecord]:
        """Each record once, and none from before a rebalance between two polls: it is read again, here or elsewhere."""
        held = {(r.partition, r.offset): r for r in records if self._consumer.holds(r.partition, r.offset)}
        return list(held.values())

    async def _hold_back(self, records: Sequence[LogRecord]) -> list[LogRecord]:
        """Returns the records that may be claimed. A rebalance ends the consumer's pause: the task is then read
        again."""
        held: dict[Partition, int] = {}
        free: list[LogRecord] = []
        for record in records:
            if record.partition in held:
                continue
            try:
                task = codec.decode_as(RolloutTask, record.value)
            except CodecError:  # `_claim` reports it
                free.append(record)
                continue
            if self._waits(record, task):
                held[record.partition] = record.offset
                self._held[record.partition] = record, task
            else:
                free.append(record)
        for partition, offset in held.items():
            if self._consumer.holds(partition, offset):
                await self._consumer.seek(partition, offset)
                self._consumer.pause([partition])
        return free

    def _waits(self, record: LogRecord, task: RolloutTask) -> bool:
        return self._control.waits(task) and not self._too_old(record, task)

    def _too_old(self, record: LogRecord, task: RolloutTask) -> bool:
        """Whether the log may soon drop the task, or the rollout has been retried for that long."""
        now_ms, limit_s = time.time_ns() // 1_000_000, self._policy.task_s
        return 0 < record.timestamp < now_ms - limit_s * 1000 or expired(task.rollout_id, now_ms, limit_s)

    async def _claim(self, records: Sequence[LogRecord], polled: float) -> list[Claim]:
        claims: list[Claim] = []
        first: dict[Partition, int] = {}
        following: dict[Partition, int] = {}
        for record in records:
            first.setdefault(record.partition, record.offset)
            following[record.partition] = record.offset + 1
        if (age_s := time.monotonic() - polled) > self._policy.session_s:
            logger.warning("%d tasks were polled %.1f s ago, another runner may have them", len(records), age_s)
            await self._read_again(first)
            return []
        sending = Acks(self._producer)
        try:
            for record in records:
                if (claim := await self._claim_one(record, sending)) is not None:
                    claims.append(claim)
            await sending.wait()
        except LogError as error:
            # Not committed, so still ours: read again. A task whose `preparing` was written gets another attempt.
            logger.warning("%d tasks could not be claimed, they are read again: %s", len(records), error)
            await self._read_again(first)
            await asyncio.sleep(self._policy.retry_s)
            return []
        try:
            await self._consumer.commit(following)
        except LogError as error:
            # Without another commit the old offset could stay for days, and the tasks come back then.
            logger.warning("%d claims are abandoned, their commit failed: %s", len(claims), error)
            await self._read_again(first)
            return []
        return claims

    async def _read_again(self, first: dict[Partition, int]) -> None:
        """Seeks back to the records that are still held. After a rebalance the committed offset decides."""
        for partition, offset in first.items():
            if self._consumer.holds(partition, offset):
                await self._consumer.seek(partition, offset)
                self._consumer.resume([partition])  # a task that blocks it is read again

    async def _claim_one(self, record: LogRecord, sending: Acks) -> Claim | None:
        """None if the record names no rollout: a dead letter is all that becomes of it."""
        refused: Outcome | None = None
        try:
            task = codec.decode_as(RolloutTask, record.value)
        except CodecError as error:
            rollout_id = record.headers.get(ROLLOUT_HEADER, b"").decode(errors="replace")
            self._dead_letter(record, "undecodable", error, sending)
            if not rollout_id:
                return None
            task, refused = (
                unreadable_task(rollout_id, record.timestamp * 1_000_000),
                _refused("undecodable", str(error)),
            )
        else:
            if self._too_old(record, task):
                days = self._policy.task_s / 86_400
                refused = stopped_by(status.FAILED, "expired", f"it has waited or been retried for {days:g} days")
                refused = replace(refused, metadata={"retry": status.RETRY_NO})
        try:
            return await self._prepare(task, sending, refused)
        except (CodecError, TooLarge) as error:
            reason = "too_large" if isinstance(error, TooLarge) else "undecodable"
            self._dead_letter(record, reason, error, sending)
            refused = _refused(reason, str(error))
        try:
            return await self._prepare(replace(task, input="", state=None, metadata={}), sending, refused)
        except (CodecError, TooLarge):  # its ids alone are too large
            return None

    def _dead_letter(self, record: LogRecord, reason: str, error: Exception, sending: Acks) -> None:
        logger.error("%s can't be run, it goes to %s: %s", record.place, self._topics.dead, error)
        send_dead_letter(sending.send, self._topics, dead_letter(record, ROLE, reason, str(error)))
        self._on_dead_letter(reason)

    async def _prepare(self, task: RolloutTask, sending: Acks, refused: Outcome | None) -> Claim:
        if task.resources_id is None:  # a retry names the version of the first attempt
            version = self._control.version_for(task.experiment_id, task.rollout_id)
            task = replace(task, resources_id=version)
        resources: Resources | None = Resources(resources_id="", experiment_id=task.experiment_id, items={})
        if task.resources_id is not None:
            found = self._control.pinned(task.resources_id)
            if found is None:  # published before the task, but perhaps not read yet
                await self._control.wait_until_current()
                found = self._control.pinned(task.resources_id)
            resources = found
        attempt_id = new_id()
        event = preparing(task, attempt_id, self._worker_id)
        headers = {KIND_HEADER: status.PREPARING.encode()}
        sending.send(self._topics.events, event, key=task.rollout_id, headers=headers)
        return Claim(task, attempt_id, resources, refused)
