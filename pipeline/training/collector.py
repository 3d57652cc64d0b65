"""Collects the ends of rollouts, with the triplets that come before them."""

import asyncio
import logging
import time
from dataclasses import dataclass, replace

from millstream.consumers.dead_letters import dead_letter, send_dead_letter
from millstream.consumers.log.port import Log
from millstream.pipeline.training.algorithm import FinishedRollout
from millstream.producers.log.port import Producer
from millstream.schemas.errors import CodecError, LogError
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import KIND_HEADER, LogRecord, Partition
from millstream.schemas.wire.prefixes import expand
from millstream.schemas.wire.records import RolloutEnd, Triplet
from millstream.schemas.wire.topics import LIFETIMES, Topics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CollectorPolicy:
    poll_records: int = 2000
    poll_s: float = 1.0  # how long a poll waits for records; it does not delay what is there
    retry_s: float = 0.5  # before the next poll after one that failed
    # After it the log may have dropped a rollout's task or end: no end that has not been read will come.
    wait_s: float = LIFETIMES.record_s


class Collector:
    """Reads the triplets topic by manual assignment, from its end at `start`.

    Ignores records of rollouts that are not outstanding: other trainers', or collected before.
    """

    def __init__(
        self, log: Log, topics: Topics, producer: Producer, policy: CollectorPolicy = CollectorPolicy()
    ) -> None:
        self._policy = policy
        self._topics = topics
        self._producer = producer  # for dead letters
        self._consumer = log.consumer()
        self._partitions = [Partition(topics.triplets, n) for n in range(topics.partitions)]
        self._outstanding: dict[str, float] = {}  # rollout → when it was expected, by the monotonic clock
        self._triplets: dict[str, list[Triplet]] = {}
        self._finished: dict[str, FinishedRollout] = {}

    async def start(self) -> None:
        """Call it before the first task is published: nothing after it is missed."""
        await self._consumer.assign(self._partitions, "end")

    def expect(self, rollout_ids: list[str]) -> None:
        """Marks rollouts as outstanding. Call it before they are published."""
        self._outstanding.update(dict.fromkeys(rollout_ids, time.monotonic()))

    @property
    def outstanding(self) -> frozenset[str]:
        return frozenset(self._outstanding)

    def positions(self) -> dict[int, int]:
        """Next offset by partition number: everything before it has been collected."""
        return {p.number: self._consumer.position(p) or 0 for p in self._partitions}

    async def collect(self, rollout_ids: list[str]) -> list[FinishedRollout]:
        """Waits until each of these has ended; in the order given. Ends, since every published rollout does, or the log
        has dropped it: that one ends as failed here."""
        missing = set(rollout_ids) - self._finished.keys()
        while missing:
            try:
                batch = await self._consumer.poll(self._policy.poll_records, self._policy.poll_s)
            except LogError as error:
                if not self._consumer.polls.forgives(error):
                    raise
                logger.warning("reading triplets failed, retrying: %s", error)
                await asyncio.sleep(self._policy.retry_s)
                continue
            for record in batch:
                self._take(record)
            late = time.monotonic() - self._policy.wait_s
            for rollout_id in missing & {each for each, since in self._outstanding.items() if since < late}:
                days = self._policy.wait_s / 86_400
                self._give_up(rollout_id, f"its end was not read within {days:g} days; the log has dropped it by now")
            missing -= self._finished.keys()
        return [self._finished.pop(rollout_id) for rollout_id in rollout_ids]

    async def close(self) -> None:
        await self._consumer.close()

    def _take(self, record: LogRecord) -> None:
        try:
            value = codec.decode(record.value)
        except CodecError as error:
            letter = dead_letter(record, "trainer", "undecodable", str(error))
            send_dead_letter(self._producer.send, self._topics, letter)
            if record.headers.get(KIND_HEADER) == b"end" and record.key in self._outstanding:
                self._give_up(record.key, f"its end can't be read: {error}")
            return
        if isinstance(value, Triplet) and value.rollout_id in self._outstanding:
            self._triplets.setdefault(value.rollout_id, []).append(value)
        elif isinstance(value, RolloutEnd) and value.rollout_id in self._outstanding:
            del self._outstanding[value.rollout_id]
            try:
                triplets = expand(self._triplets.pop(value.rollout_id, []))
            except ValueError as error:  # one was undecodable, and is a dead letter
                logger.warning("rollout %s is not trained on: %s", value.rollout_id, error)
                value, triplets = replace(value, trainable=False, reason=str(error)), []
            self._finished[value.rollout_id] = FinishedRollout(value, tuple(triplets))

    def _give_up(self, rollout_id: str, reason: str) -> None:
        logger.error("rollout %s is not trained on: %s", rollout_id, reason)
        del self._outstanding[rollout_id]
        self._triplets.pop(rollout_id, None)
        now = time.time_ns()
        end = RolloutEnd(
            rollout_id=rollout_id,
            group_id="",
            group_size=1,
            status=status.FAILED,
            attempts=1,
            trainable=False,
            reason=reason,
            created_at=now,
            ended_at=now,
        )
        self._finished[rollout_id] = FinishedRollout(end, ())
