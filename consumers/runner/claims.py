"""Claiming tasks: poll, write ``preparing``, have it acknowledged, commit, and only then run.

From its claim on an attempt lives in the log, not in Kafka's redelivery: a rebalance re-runs nothing. If the commit
fails the tasks belong to somebody else, or nobody knows: nothing of them is run, and the lease written with
``preparing`` tells the adapter when to stop waiting.

A partition is read in order and has one committed offset, so a task of a paused experiment can't be skipped: it holds
back its partition, and what lies behind it, until the experiment is resumed. It neither runs nor moves meanwhile, and
whoever gets the partition meets it again. An experiment that must not wait for another has a topic_prefix of its own.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from millstream.consumers.control import ControlFollower
from millstream.consumers.dead_letters import dead_letter, send_dead_letter
from millstream.consumers.log.port import Consumer, Log
from millstream.producers.log.acknowledgements import Acknowledgements
from millstream.producers.log.port import Producer
from millstream.schemas.control import Resources
from millstream.schemas.errors import CodecError, LogError, LogUnavailable, TooLarge, TransactionAborted
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import KIND_HEADER, LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutTask
from millstream.schemas.wire.topics import PRIORITIES, PRIORITY_WEIGHTS, Topics

logger = logging.getLogger(__name__)

ROLE = "runner"
RETRY_S = 1.0  # before the next claim when the log did not take this one
LAG_S = 10.0  # between two looks at the lag, while there are free slots and no tasks


class WeightedTurns:
    """Deals out slots among the priorities by weight, smoothly: of each 13 in a row high gets 8, normal 4, low 1,
    however few are dealt at a time. (Smooth weighted round-robin, as in nginx.)"""

    def __init__(self) -> None:
        self._credit = dict.fromkeys(PRIORITIES, 0)

    def take(self, slots: int) -> dict[str, int]:
        """How many of the next ``slots`` each priority gets."""
        shares = dict.fromkeys(PRIORITIES, 0)
        total = sum(PRIORITY_WEIGHTS.values())
        for _ in range(slots):
            for priority, weight in PRIORITY_WEIGHTS.items():
                self._credit[priority] += weight
            chosen = max(PRIORITIES, key=self._credit.__getitem__)
            self._credit[chosen] -= total
            shares[chosen] += 1
        return shares


class Starvation:
    """Notices a consumer that polls and gets nothing although its lag grows: it is stuck. ``clock`` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._least: int | None = None  # lag seen
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Since the lag began to be more than it had been, with nothing got."""
        since = self._since  # read once: asked from another thread
        return 0.0 if since is None else self._clock() - since

    def ended(self) -> None:
        """Something was got, nothing was wanted, it is another lag from now on, or the log itself was away."""
        self._least = self._since = None

    def saw(self, lag: int) -> None:
        if self._least is None or lag <= self._least:
            self._least, self._since = lag, None
        elif self._since is None:
            self._since = self._clock()


@dataclass(frozen=True, slots=True)
class Claim:
    """A task that is ours to run. ``resources`` is None if the version that it is pinned to does not exist."""

    task: RolloutTask
    attempt_id: str
    resources: Resources | None
    cancelled: str | None = None  # what has been cancelled that it belongs to: it is settled, not run


def preparing(task: RolloutTask, attempt_id: str, worker_id: str) -> AttemptEvent:
    """A claim as it is written: the first record of its attempt."""
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


class Claims:
    """The runner's consumer of the tasks topics."""

    def __init__(self, log: Log, topics: Topics, producer: Producer, control: ControlFollower, worker_id: str) -> None:
        self._topics = topics
        self._producer = producer
        self._control = control
        self._worker_id = worker_id
        self._turns = WeightedTurns()
        self._held: dict[Partition, RolloutTask] = {}  # the task that holds it back
        self._looked = time.monotonic()
        self._assigned: frozenset[Partition] = frozenset()
        self.starvation = Starvation()
        self._consumer: Consumer = log.consumer(f"{topics.prefix}.runner")

    async def start(self) -> None:
        await self._consumer.subscribe([self._topics.tasks(priority) for priority in PRIORITIES])

    async def close(self) -> None:
        await self._consumer.close()

    async def claim(self, slots: int, timeout_s: float) -> list[Claim]:
        """Up to ``slots`` (at least 1) tasks, claimed; returns as soon as there are any, or empty at the deadline."""
        try:
            released = [partition for partition, task in self._held.items() if not self._control.waits(task)]
            self._consumer.resume(released)
            for partition in released:
                del self._held[partition]
            records = await self._poll(slots, timeout_s)
            if records or released:
                self.starvation.ended()
            elif time.monotonic() - self._looked > LAG_S:
                await self._look()
            if self._control.pauses:
                records = await self._hold_back(records)
            return await self._claim(records) if records else []
        except LogUnavailable as error:
            logger.warning("no tasks can be claimed: %s", error)
            self.starvation.ended()
            await asyncio.sleep(RETRY_S)
            return []

    async def stay(self, timeout_s: float) -> None:
        """Remains in the group while there is no free slot; takes nothing."""
        self.starvation.ended()
        try:
            await self._consumer.poll(1, timeout_s, ())
        except LogUnavailable as error:
            logger.warning("the log does not answer: %s", error)
            await asyncio.sleep(RETRY_S)

    async def _look(self) -> None:
        self._looked = time.monotonic()
        assigned = self._consumer.assignment()
        if assigned != self._assigned:
            self._assigned = assigned
            self.starvation.ended()
        ends = await self._consumer.end_offsets(assigned - self._held.keys())
        # A position is not known for a moment after a rebalance: the lag then seems large, and is small again.
        self.starvation.saw(sum(end - (self._consumer.position(partition) or 0) for partition, end in ends.items()))

    async def _poll(self, slots: int, timeout_s: float) -> list[LogRecord]:
        records = await self._poll_now(slots)
        if not records:
            # One record at most: what has come with it is then shared out by weight again.
            records = await self._consumer.poll(1, timeout_s)
            if records and slots > 1:
                records += await self._poll_now(slots - 1)
        return records

    async def _poll_now(self, slots: int) -> list[LogRecord]:
        """By weight; what one priority leaves goes to the others, high first."""
        found: list[LogRecord] = []
        backlog: list[str] = []  # topics that gave all they were asked for
        for priority, share in self._turns.take(slots).items():
            topic = self._topics.tasks(priority)
            got = await self._consumer.poll(share, 0, [topic]) if share else []
            found += got
            if len(got) == share:
                backlog.append(topic)
        for topic in backlog:
            if len(found) < slots:
                found += await self._consumer.poll(slots - len(found), 0, [topic])
        return found

    async def _hold_back(self, records: Sequence[LogRecord]) -> list[LogRecord]:
        """The records that may be claimed. A rebalance lifts the consumer's pause: the task is then met again."""
        held: dict[Partition, int] = {}
        free: list[LogRecord] = []
        for record in records:
            if record.partition in held:
                continue
            try:
                task = codec.decode_as(RolloutTask, record.value)
            except CodecError:  # `_claim` says so
                free.append(record)
                continue
            if self._control.waits(task):
                held[record.partition] = record.offset
                self._held[record.partition] = task
            else:
                free.append(record)
        for partition, offset in held.items():
            if partition in self._consumer.assignment():
                await self._consumer.seek(partition, offset)
                self._consumer.pause([partition])
        return free

    async def _claim(self, records: Sequence[LogRecord]) -> list[Claim]:
        claims: list[Claim] = []
        first: dict[Partition, int] = {}
        following: dict[Partition, int] = {}
        sending = Acknowledgements(self._producer)
        try:
            for record in records:
                first.setdefault(record.partition, record.offset)
                following[record.partition] = record.offset + 1
                try:
                    task = codec.decode_as(RolloutTask, record.value)
                    claim = await self._prepare(task, sending)
                except (CodecError, TooLarge) as error:
                    reason = "too_large" if isinstance(error, TooLarge) else "undecodable"
                    logger.error("%s is no task, it goes to %s: %s", record.place, self._topics.dead, error)
                    send_dead_letter(sending.send, self._topics, dead_letter(record, ROLE, reason, str(error)))
                else:
                    claims.append(claim)
            await sending.wait()
        except LogError as error:
            # Not committed, so still ours: read again. Whoever has a `preparing` gets another attempt.
            logger.warning("%d tasks could not be claimed, they are read again: %s", len(records), error)
            for partition, offset in first.items():
                if partition in self._consumer.assignment():
                    await self._consumer.seek(partition, offset)
                    self._consumer.resume([partition])  # what holds it back is met again
            await asyncio.sleep(RETRY_S)
            return []
        try:
            await self._consumer.commit(following)
        except (TransactionAborted, LogUnavailable) as error:
            logger.warning("%d claims are given up, their commit failed: %s", len(claims), error)
            return []
        return claims

    async def _prepare(self, task: RolloutTask, sending: Acknowledgements) -> Claim:
        if task.resources_id is None:
            resources = self._control.latest(task.experiment_id)
            if resources is None:
                resources = Resources(resources_id="", experiment_id=task.experiment_id, items={})
            else:
                task = replace(task, resources_id=resources.resources_id)
        else:
            found = self._control.pinned(task.resources_id)
            if found is None:  # announced before the task was published, but perhaps not read yet
                await self._control.wait_until_current()
                found = self._control.pinned(task.resources_id)
            resources = found
        attempt_id = new_id()
        event = preparing(task, attempt_id, self._worker_id)
        headers = {KIND_HEADER: status.PREPARING.encode()}
        sending.send(self._topics.events, event, key=task.rollout_id, headers=headers)
        return Claim(task, attempt_id, resources, self._control.cancelled(task))
