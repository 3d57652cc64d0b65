"""Writes what the adapter has decided, in one transaction: all of it or nothing."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from millstream.consumers.adapter.decision import Decision
from millstream.consumers.adapter.settle import ROLE
from millstream.consumers.dead_letters import dead_letter, send_dead_letter
from millstream.producers.log.port import TransactionalProducer
from millstream.schemas.errors import LogUnavailable, TooLarge, TransactionAborted
from millstream.schemas.wire import status
from millstream.schemas.wire.log import KIND_HEADER, Partition
from millstream.schemas.wire.records import DeadLetter, Record, Settled
from millstream.schemas.wire.settled import packed
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)

T = TypeVar("T")
Send = Callable[..., None]  # `Producer.send`, with an ``on_ack``


@dataclass(frozen=True, slots=True)
class Transaction:
    decisions: list[tuple[Partition, str, Decision]] = field(default_factory=list)  # with their rollouts
    dead: list[tuple[Partition, int, DeadLetter]] = field(default_factory=list)  # with their records' offsets
    offsets: dict[Partition, int] = field(default_factory=dict)

    def settled(self) -> dict[Partition, Settled]:
        """The record that makes all of it final, by partition."""
        marks: dict[Partition, list[int]] = {}
        refused: dict[Partition, list[int]] = {}
        for partition, _, decision in self.decisions:
            marks.setdefault(partition, []).extend(decision.marks)
            if decision.retry is None:
                refused.setdefault(partition, []).extend(record.offset for record, _, _ in decision.dead)
        for partition, offset, _ in self.dead:
            refused.setdefault(partition, []).append(offset)
        return {
            partition: Settled(marks=packed(marks.get(partition, ())), refused=tuple(refused.get(partition, ())))
            for partition in marks.keys() | refused.keys()
        }


class Oversized(Exception):
    """A decision holds a record larger than the topics take."""

    def __init__(self, partition: Partition, rollout_id: str, error: TooLarge) -> None:
        super().__init__(f"too_large: {error}")
        self.partition = partition
        self.rollout_id = rollout_id


class TransactionWriter:
    """``call_s``: the time limit of one call to the log. A call is repeated while its outcome is unknown: after a
    commit that timed out nothing else may follow."""

    def __init__(self, producer: TransactionalProducer, topics: Topics, call_s: float) -> None:
        self._producer = producer
        self._topics = topics
        self._call_s = call_s
        self._called: float | None = None

    @property
    def call_age_s(self) -> float:
        """Duration of the current call to the log; 0 without one. From any thread."""
        called = self._called
        return 0.0 if called is None else time.monotonic() - called

    async def open(self) -> None:
        """Fences predecessors. Raises `Fenced` if a newer adapter has this transactional id."""
        await self._call(lambda: self._producer.init_transactions(self._call_s))

    async def write(self, work: Transaction, group: object) -> None:
        """Commits ``work``. Raises `TransactionAborted` and `Oversized`: call `abort` then."""
        await asyncio.to_thread(self._commit, work, group)

    async def abort(self) -> None:
        await self._call(lambda: self._producer.abort_transaction(self._call_s))

    async def close(self) -> None:
        await asyncio.to_thread(self._producer.close)

    def _commit(self, work: Transaction, group: object) -> None:
        """Runs in a thread, and polls nothing meanwhile."""
        failed: list[Exception] = []

        def on_ack(error: Exception | None, _offset: int) -> None:
            if error is not None:
                failed.append(error)

        send = partial(self._producer.send, on_ack=on_ack)
        self._repeat(self._producer.begin_transaction)
        for partition, rollout_id, decision in work.decisions:
            try:
                self._send_decision(send, partition.number, rollout_id, decision)
            except TooLarge as error:
                raise Oversized(partition, rollout_id, error) from error
        for _, _, letter in work.dead:
            send_dead_letter(send, self._topics, letter)
        for partition, settled in work.settled().items():
            send(self._topics.settled, settled, partition=partition.number, headers={KIND_HEADER: b"settled"})
        # Flushed before the offsets: else outputs could land behind the watermark that a successor reads up to.
        self._repeat(lambda: self._producer.flush(self._call_s))
        if failed:
            raise TransactionAborted(f"{len(failed)} of its records were refused, the first: {failed[0]}")
        if work.offsets:
            self._repeat(lambda: self._producer.send_offsets(work.offsets, group, self._call_s))
        self._repeat(lambda: self._producer.commit_transaction(self._call_s))

    def _send_decision(self, send: Send, number: int, rollout_id: str, decision: Decision) -> None:
        def place(topic: str, value: Record, kind: str) -> None:
            """On the partition of the events, named explicitly: triplets lie beside what they were made from."""
            send(topic, value, key=rollout_id, partition=number, headers={KIND_HEADER: kind.encode()})

        if (retry := decision.retry) is not None:
            send(self._topics.tasks(retry.task.priority), retry.task, headers={KIND_HEADER: b"task"})
            place(self._topics.events, retry.mark, status.RETRY)
            return
        for triplet in decision.triplets:
            place(self._topics.triplets, triplet, "triplet")
        place(self._topics.triplets, decision.end, "end")
        place(self._topics.events, decision.end, "end")
        for record, reason, error in decision.dead:
            send_dead_letter(send, self._topics, dead_letter(record, ROLE, reason, error))

    def _repeat(self, call: Callable[[], T]) -> T:
        while True:
            self._called = time.monotonic()
            try:
                return call()
            except LogUnavailable as error:
                logger.warning("the log doesn't answer, trying again: %s", error)
            finally:
                self._called = None

    async def _call(self, call: Callable[[], T]) -> T:
        return await asyncio.to_thread(self._repeat, call)
