"""Waits for the ends of rollouts, and keeps the triplets that came before them."""

import logging
from dataclasses import replace

from millstream.consumers.dead_letters import dead_letter, send_dead_letter
from millstream.consumers.log.port import Log
from millstream.pipeline.training.algorithm import FinishedRollout
from millstream.producers.log.port import Producer
from millstream.schemas.errors import CodecError, LogUnavailable
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.prefixes import expand
from millstream.schemas.wire.records import RolloutEnd, Triplet
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)

POLL_RECORDS = 2000
POLL_S = 1.0


class Collector:
    """Reads ``triplets`` by manual assignment, from where the log ended when it was started.

    Rollouts that are not outstanding are somebody else's, or were collected before: their records are ignored.
    """

    def __init__(self, log: Log, topics: Topics, producer: Producer) -> None:
        self._topics = topics
        self._producer = producer  # for dead letters
        self._consumer = log.consumer()
        self._partitions = [Partition(topics.triplets, n) for n in range(topics.partitions)]
        self._outstanding: set[str] = set()
        self._triplets: dict[str, list[Triplet]] = {}
        self._finished: dict[str, FinishedRollout] = {}

    async def start(self) -> None:
        """From here on nothing is missed; call before the first task is published."""
        await self._consumer.assign(self._partitions, "end")

    def expect(self, rollout_ids: list[str]) -> None:
        """These rollouts are outstanding: call before they are published."""
        self._outstanding.update(rollout_ids)

    @property
    def outstanding(self) -> frozenset[str]:
        return frozenset(self._outstanding)

    def positions(self) -> dict[int, int]:
        """Next offset by partition number: everything before it has been collected."""
        return {p.number: self._consumer.position(p) or 0 for p in self._partitions}

    async def collect(self, rollout_ids: list[str]) -> list[FinishedRollout]:
        """Waits until each of these has ended; in the order given. Every published rollout ends, so this does too."""
        missing = set(rollout_ids) - self._finished.keys()
        while missing:
            try:
                batch = await self._consumer.poll(POLL_RECORDS, POLL_S)
            except LogUnavailable as error:
                logger.warning("triplets can't be read, trying again: %s", error)
                continue
            for record in batch:
                self._take(record)
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
            return
        if isinstance(value, Triplet) and value.rollout_id in self._outstanding:
            self._triplets.setdefault(value.rollout_id, []).append(value)
        elif isinstance(value, RolloutEnd) and value.rollout_id in self._outstanding:
            self._outstanding.discard(value.rollout_id)
            try:
                triplets = expand(self._triplets.pop(value.rollout_id, []))
            except ValueError as error:  # one could not be read, and is a dead letter
                logger.warning("not trained on: %s", error)
                value, triplets = replace(value, trainable=False, reason=str(error)), []
            self._finished[value.rollout_id] = FinishedRollout(value, tuple(triplets))
