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
from millstream.consumers.dead_letters import dead_letter, send_dead_letter, without_body
from millstream.producers.log.port import TransactionalProducer
from millstream.producers.tasks import task_headers
from millstream.schemas.errors import CodecError, LogUnavailable, TooLarge, TransactionAborted
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


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """How much one transaction holds, and for how long. The brokers end one after 10 s
    (`ProducerPolicy.transaction_ms`), and fence its producer."""

    rollouts: int = 500
    first_bytes: int = 1 << 20  # takes a second on a link of 1 MB/s
    most_bytes: int = 32 << 20
    fast_s: float = 1.0  # a commit within this doubles the bytes of the next transaction
    slow_s: float = 3.0  # one that takes longer halves them, and so does an abort
    send_s: float = 6.0  # for its records; then it is aborted, before the brokers do so
    # How often a decision of at least ``first_bytes`` may fail so, all by itself: an outage can do it once or twice.
    slow_tries: int = 3


class Budget:
    """Bounds transactions in bytes, by how long the last ones took; at least one decision fits each."""

    def __init__(self, policy: BudgetPolicy) -> None:
        self._policy = policy
        self.bytes = policy.first_bytes
        self._left = 0
        self._rollouts = 0
        self._empty = True
        self.full = False  # something did not fit into the last transaction

    def begin(self) -> None:
        self._left, self._rollouts, self._empty, self.full = self.bytes, self._policy.rollouts, True, False

    def takes(self, size: int) -> bool:
        """Whether ``size`` bytes more may go into the transaction; if so, they count."""
        if not self._empty and (size > self._left or not self._rollouts):
            self.full = True
            return False
        self._left, self._rollouts, self._empty = self._left - size, self._rollouts - 1, False
        return True

    def committed(self, took_s: float) -> None:
        if took_s > self._policy.slow_s:
            self.halve()
        elif took_s < self._policy.fast_s:
            self.bytes = min(2 * self.bytes, self._policy.most_bytes)

    def halve(self) -> None:
        self.bytes = max(self.bytes // 2, 1)

    def one(self) -> None:
        """The next transaction holds one decision."""
        self.bytes = 1


class Unwritable(Exception):
    """A record of a decision, or a dead letter (``rollout_id`` is None), can't be written. The message is a reason for
    the rollout's end."""

    def __init__(self, partition: Partition, rollout_id: str | None, offset: int, error: Exception) -> None:
        super().__init__(f"{'too_large' if isinstance(error, TooLarge) else 'not_encodable'}: {error}")
        self.partition = partition
        self.rollout_id = rollout_id
        self.offset = offset  # of the dead letter's record


class TooSlow(TransactionAborted):
    """The records were not acknowledged in time."""


class RefusedTogether(TransactionAborted):
    """The brokers found records too large. Which decision they belong to is certain only if it is alone."""


Owner = tuple[Partition, str | None, int]  # as the fields of `Unwritable`


class TransactionWriter:
    """``call_s``: the time limit of one call to the log. A call is repeated while its outcome is unknown: after a
    commit that timed out nothing else may follow. ``stopping``: once it is true, a call is not repeated."""

    def __init__(self, producer: TransactionalProducer, topics: Topics, call_s: float, policy: BudgetPolicy) -> None:
        self._producer = producer
        self._topics = topics
        self._call_s = call_s
        self._policy = policy
        self._slow: tuple[Owner | None, int] = None, 0  # what was too slow by itself, and how often in a row
        self._called: float | None = None
        self.stopping: Callable[[], bool] = lambda: False

    @property
    def call_age_s(self) -> float:
        """Duration of the current call to the log; 0 without one. From any thread."""
        called = self._called
        return 0.0 if called is None else time.monotonic() - called

    async def open(self) -> None:
        """Fences predecessors. Raises `Fenced` if a newer adapter has this transactional id."""
        await self._call(lambda: self._producer.init_transactions(self._call_s))

    async def write(self, work: Transaction, group: object) -> None:
        """Commits ``work``. Raises `TransactionAborted` and `Unwritable`: call `abort` then. `LogUnavailable`: the
        process is to stop, and the outcome is unknown."""
        await asyncio.to_thread(self._commit, work, group)

    async def abort(self) -> None:
        await self._call(lambda: self._producer.abort_transaction(self._call_s))

    async def close(self) -> None:
        await asyncio.to_thread(self._producer.close)

    def _commit(self, work: Transaction, group: object) -> None:
        """Runs in a thread, and polls nothing meanwhile."""
        failed: list[tuple[Owner | None, Exception]] = []

        def sender(owner: Owner | None) -> Send:
            def on_ack(error: Exception | None, _offset: int) -> None:
                if error is not None:
                    failed.append((owner, error))

            return partial(self._producer.send, on_ack=on_ack)

        self._repeat(self._producer.begin_transaction)
        deadline = time.monotonic() + self._policy.send_s
        for partition, rollout_id, decision in work.decisions:
            try:
                self._send_decision(sender((partition, rollout_id, -1)), partition.number, rollout_id, decision)
            except (TooLarge, CodecError) as error:
                raise Unwritable(partition, rollout_id, -1, error) from error
        for partition, offset, letter in work.dead:
            try:
                send_dead_letter(sender((partition, None, offset)), self._topics, letter)
            except (TooLarge, CodecError) as error:
                raise Unwritable(partition, None, offset, error) from error
        for partition, settled in work.settled().items():
            headers = {KIND_HEADER: b"settled"}
            sender(None)(self._topics.settled, settled, partition=partition.number, headers=headers)
        # Flushed before the offsets: else outputs could land behind the watermark that a successor reads up to.
        try:
            self._repeat(lambda: self._flush(deadline))
        except TooSlow as error:
            self._check_alone(work, error)
            raise
        self._slow = None, 0
        self._check(work, failed)
        if work.offsets:
            self._repeat(lambda: self._producer.send_offsets(work.offsets, group, self._call_s))
        self._repeat(lambda: self._producer.commit_transaction(self._call_s))

    def _flush(self, deadline: float) -> None:
        try:
            self._producer.flush(max(0.0, min(self._call_s, deadline - time.monotonic())))
        except LogUnavailable as error:
            if time.monotonic() < deadline:
                raise
            raise TooSlow(f"its records took longer than {self._policy.send_s:g} s to send: {error}") from error

    def _check_alone(self, work: Transaction, error: TooSlow) -> None:
        """Raises `Unwritable` if this decision, or dead letter, can't be sent in time."""
        alone: list[tuple[Owner, int]] = [
            ((p, rollout_id, -1), decision.size) for p, rollout_id, decision in work.decisions
        ]
        alone += [((p, None, offset), len(letter.value or b"")) for p, offset, letter in work.dead]
        if len(alone) != 1 or alone[0][1] < self._policy.first_bytes:
            return
        owner, size = alone[0]
        tries = self._slow[1] + 1 if self._slow[0] == owner else 1
        self._slow = owner, tries
        if tries >= self._policy.slow_tries:
            too_slow = TooLarge(
                f"its {size:,} bytes could not be sent within {self._policy.send_s:g} s, in {tries} tries. The link to "
                'the brokers, or their quota, is too slow for it: widen it, set compression = "zstd", or make the '
                "rollout shorter"
            )
            raise Unwritable(*owner, too_slow) from error

    def _check(self, work: Transaction, failed: list[tuple[Owner | None, Exception]]) -> None:
        if not failed:
            return
        owner, error = next(((o, e) for o, e in failed if o and isinstance(e, TooLarge)), failed[0])
        message = f"{len(failed)} of its records were refused, the first: {error}"
        if owner is None or not isinstance(error, TooLarge):
            raise TransactionAborted(message)
        if len(work.decisions) + len(work.dead) > 1:  # a batch is refused as a whole, with what is beside the record
            raise RefusedTogether(message)
        raise Unwritable(*owner, error)

    def _send_decision(self, send: Send, number: int, rollout_id: str, decision: Decision) -> None:
        def place(topic: str, value: Record | bytes, kind: str) -> None:
            """On the partition of the events, named explicitly: triplets lie beside what they were made from."""
            send(topic, value, key=rollout_id, partition=number, headers={KIND_HEADER: kind.encode()})

        if (retry := decision.retry) is not None:
            send(self._topics.tasks(retry.task.priority), retry.task, headers=task_headers(retry.task))
            place(self._topics.events, retry.mark, status.RETRY)
            return
        for triplet in decision.encoded:
            place(self._topics.triplets, triplet, "triplet")
        place(self._topics.triplets, decision.end, "end")
        place(self._topics.events, decision.end, "end")
        for record, reason, error in decision.dead:
            letter = dead_letter(record, ROLE, reason, error)
            send_dead_letter(send, self._topics, without_body(letter) if decision.reduced else letter)

    def _repeat(self, call: Callable[[], T]) -> T:
        while True:
            self._called = time.monotonic()
            try:
                return call()
            except LogUnavailable as error:
                if self.stopping():
                    raise
                logger.warning("the log doesn't answer, trying again: %s", error)
            finally:
                self._called = None

    async def _call(self, call: Callable[[], T]) -> T:
        return await asyncio.to_thread(self._repeat, call)
