"""The adapter: decides how every rollout ends, as a transactional stream processor over ``events``.

`settle` makes the decisions; here are reading, and choosing what to write when. One transaction holds the triplets and
ends, what they settle, the dead letters and the input offsets, so a decision is made once, whichever process dies.
After an assignment the marks of all earlier decisions are loaded, then the partition is folded from the committed
offset. ARCHITECTURE.md, "Exactly once", explains why each step is there.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import takewhile

from prometheus_client import CollectorRegistry

from millstream.consumers.adapter.metrics import AdapterMetrics
from millstream.consumers.adapter.settle import ROLE, FoldPolicy, PartitionFold
from millstream.consumers.adapter.transaction import (
    Budget,
    BudgetPolicy,
    RefusedTogether,
    Transaction,
    TransactionWriter,
    Unwritable,
)
from millstream.consumers.adapter.triplets import ToTriplets, to_triplets
from millstream.consumers.dead_letters import dead_letter, without_body
from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.producers.log_lines import rollout_fields
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas.errors import CodecError, LogError, LogUnavailable, TransactionAborted
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import EndOfPartition, LogRecord, Partition, age_s
from millstream.schemas.wire.records import DeadLetter, Settled
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterPolicy:
    poll_records: int = 1000
    poll_s: float = 0.05
    transaction_s: float = 0.05  # between transactions: decisions are written together
    budget: BudgetPolicy = field(default_factory=BudgetPolicy)
    offsets_s: float = 2.0  # between transactions that only move offsets
    call_s: float = 5.0  # one try of a call to the log; it is repeated
    probe_s: float = 0.5  # between watermark probes; while none succeeds, no lease expires
    stall_s: float = 1.0  # a gap in our own loop after which leases start anew: this process was frozen
    process_bytes: int = 1 << 30  # of open rollouts; above it the largest fails
    fold: FoldPolicy = field(default_factory=FoldPolicy)

    @property
    def lost_call_s(self) -> float:
        """When a broker dies, librdkafka (2.16) can lose the answer to a transaction's call. The call then never
        returns, whatever its time-out, and only a new process can continue. By then the broker has ended the
        transaction."""
        return 2 * self.call_s


@dataclass(slots=True)
class _Part:
    fold: PartitionFold
    high_watermark: int = 0
    start: int = 0  # the offset of the first record
    load: Background | None = None  # of what predecessors have settled; begins with that record
    loaded: bool = False
    position: int | None = None  # None until the load has ended
    read_ms: int = 0  # timestamp of the last record that was folded, ms since the epoch
    caught_up_since: float | None = None
    committed: int = -1
    dead: dict[int, DeadLetter] = field(default_factory=dict)  # by offset, not yet written


class Adapter:
    """Settles every rollout whose events lie on the partitions it owns.

    ``to_triplets`` is the pure part that users may replace. ``registry`` gets its metrics. ``clock`` counts seconds.
    """

    def __init__(
        self,
        log: Log,
        topics: Topics,
        *,
        transactional_id: str,
        to_triplets: ToTriplets = to_triplets,
        registry: CollectorRegistry | None = None,
        policy: AdapterPolicy = AdapterPolicy(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self._log = log
        self._topics = topics
        self._to_triplets = to_triplets
        self._clock = clock
        self._consumer = log.transactional_consumer(f"{topics.prefix}.adapter")
        producer = log.transactional_producer(transactional_id)
        self._writer = TransactionWriter(producer, topics, policy.call_s, policy.budget)
        self._budget = Budget(policy.budget)
        self._metrics = AdapterMetrics(registry or CollectorRegistry())
        self._parts: dict[Partition, _Part] = {}
        self._group: object = None
        self._loads = asyncio.Semaphore(8)  # each needs a connection
        self._not_before = clock()
        self._ready = asyncio.Event()

    # RebalanceListener: called within poll, must not block.

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._parts[partition] = _Part(self._new_fold())
        # Only here: metadata taken just before a transaction would let a zombie commit another member's partitions.
        self._group = self._consumer.group_metadata()
        self._ready.set()

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._parts.pop(partition, None)

    async def wait_ready(self) -> None:
        """Waits for the group's first assignment to this member."""
        await self._ready.wait()

    @property
    def call_age_s(self) -> float:
        """Duration of the transaction's current call; above `AdapterPolicy.lost_call_s` it will never return."""
        return self._writer.call_age_s

    @property
    def open_rollouts(self) -> int:
        """Claimed and not ended, on the partitions of this adapter. From any thread."""
        return sum(len(part.fold.open) for part in tuple(self._parts.values()))

    @property
    def lag_s(self) -> float:
        """About how old the first record is that is not folded yet: as old as the last one that is, of the partition
        that is furthest behind. 0 if all are folded. From any thread."""
        parts = tuple(self._parts.values())
        behind = [p.read_ms for p in parts if p.read_ms and p.position is not None and p.position < p.high_watermark]
        return age_s(min(behind, default=None))

    @property
    def lag_records(self) -> int:
        """Records of its partitions that were not folded at the last probe. From any thread."""
        parts = tuple(self._parts.values())
        return sum(max(p.high_watermark - p.position, 0) for p in parts if p.position is not None)

    @property
    def idle(self) -> bool:
        """Everything that was on the assigned partitions at the last probe is read, and all decisions are written."""
        return all(
            part.position is not None
            and part.caught_up_since is not None
            and part.position >= part.high_watermark
            and not (part.dead or part.fold.unreadable or part.fold.decided)
            for part in self._parts.values()
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until ``stop``, then writes what has been decided, while the log takes it. Raises `Fenced` if another
        adapter has taken this one's transactional id: the process should exit and be restarted by its supervisor."""
        self._writer.stopping = stop.is_set
        try:
            await self._writer.open()
            await self._consumer.subscribe([self._topics.events], self)
            await self._loop(stop)
            while await self._write(self._clock()):
                pass
        except LogUnavailable as error:  # only once it is to stop
            logger.warning("stopped before all decisions were written; the next adapter makes them again: %s", error)
        finally:
            for part in self._parts.values():
                if part.load is not None:
                    await part.load.close()
            await self._consumer.close()
            await self._writer.close()

    async def _loop(self, stop: asyncio.Event) -> None:
        last = written = probed = self._clock()
        while not stop.is_set():
            behind = self._budget.full and self._decided(self._clock())  # first write what one transaction can't hold
            if not behind:
                await self._read()
            now = self._clock()
            if now - last > self.policy.stall_s:
                self._not_before = now
            last = now
            if now - probed > self.policy.probe_s:
                probed = now
                if await self._probe():
                    self._expire(now)
                else:
                    self._not_before = self._clock()
            since = now - written
            if behind or since >= self.policy.offsets_s or (since >= self.policy.transaction_s and self._decided(now)):
                written = now
                await self._write(now)

    def _decided(self, now: float) -> bool:
        return any(part.dead or next(part.fold.ready(now), None) for part in self._parts.values())

    async def _read(self) -> None:
        try:
            await self._begin()
            batch = await self._consumer.poll(self.policy.poll_records, self.policy.poll_s)
        except LogError as error:
            text = "events can't be read, retrying: %s"
            await self._consumer.polls.sit_out(error, logger.warning, text, self.policy.poll_s)
            return
        for item in batch:
            if (part := self._parts.get(item.partition)) is not None and part.load is None:
                part.start = item.offset
                part.load = supervisor().job(f"settled {item.partition}", self._load(item.partition, part))
        now = self._clock()
        for item in batch:
            part = self._parts.get(item.partition)
            if part is None or part.position is None:
                continue
            if isinstance(item, EndOfPartition):
                part.position = max(part.position, item.offset)
            else:
                self._apply(part, item, now)
        self._bound_memory(now)

    def _bound_memory(self, now: float) -> None:
        folds, limit = [part.fold for part in self._parts.values()], self.policy.process_bytes
        while sum(fold.size for fold in folds) > limit:
            fold = max(folds, key=PartitionFold.largest)
            size, rollout_id = fold.largest()
            message = f"{size:,} bytes, the most of all open rollouts; the adapter keeps {limit:,} in all"
            fold.too_large(rollout_id, message, time.time_ns(), now)

    async def _load(self, partition: Partition, part: _Part) -> None:
        """Loads what predecessors have settled. The topic is read to its end, open transactions included: a
        predecessor's last decisions must be known. Meanwhile the records of the partition are skipped, and other
        partitions are folded."""
        settled = [Partition(self._topics.settled, partition.number)]
        while not part.loaded:
            part.fold = self._new_fold()
            try:
                async with self._loads, aclosing(read_to_end(self._log, settled)) as records:
                    async for record in records:
                        self._load_record(part.fold, record, part.start)
                part.loaded = True
            except LogError as error:
                text = "what has been settled can't be read, trying again: %s"
                await self._consumer.polls.sit_out(error, logger.warning, text, self.policy.probe_s)

    async def _begin(self) -> None:
        """Begins to fold the partitions whose load has ended. Not while a poll runs, which may revoke them."""
        for partition, part in self._parts.items():
            if part.position is None and part.loaded:
                part.high_watermark = (await self._consumer.end_offsets([partition]))[partition]
                await self._consumer.seek(partition, part.start)
                part.position = part.start

    def _new_fold(self) -> PartitionFold:
        return PartitionFold(self._to_triplets, self.policy.fold, on_late=self._metrics.late)

    def _load_record(self, fold: PartitionFold, record: LogRecord, start: int) -> None:
        try:
            fold.load(codec.decode_as(Settled, record.value), record.timestamp, start)
        except (CodecError, ValueError) as error:
            logger.error("%s was not written by an adapter, it is ignored: %s", record.place, error)

    def _apply(self, part: _Part, record: LogRecord, now: float) -> None:
        try:
            part.fold.apply(record, now)
        except CodecError as error:
            if record.offset not in part.fold.refused:
                part.dead[record.offset] = dead_letter(record, ROLE, "undecodable", str(error))
        part.position = record.offset + 1
        part.read_ms = record.timestamp

    async def _probe(self) -> bool:
        """Whether the log answers for every partition. Notes which partitions are read as fast as they are written: an
        attempt whose heartbeat lies unread in the log must not expire."""
        partitions = [p for p, part in self._parts.items() if part.position is not None]
        try:
            ends = await self._consumer.end_offsets(partitions) if partitions else {}
        except LogError as error:
            text = "the log doesn't answer; no lease expires meanwhile: %s"
            await self._consumer.polls.sit_out(error, logger.warning, text)
            return False
        for partition, end in ends.items():
            if (part := self._parts.get(partition)) and part.position is not None:
                if part.position < part.high_watermark:
                    part.caught_up_since = None
                elif part.caught_up_since is None:
                    part.caught_up_since = self._clock()
                part.high_watermark = end  # must be read by the next probe
        return True

    def _expire(self, now: float) -> None:
        for part in self._parts.values():
            if part.caught_up_since is not None:
                part.fold.expire(now, max(self._not_before, part.caught_up_since), time.time_ns())

    async def _write(self, now: float) -> bool:
        """One transaction: decisions, dead letters and offsets. False if there was nothing to write, or it was
        aborted."""
        work = Transaction()
        self._budget.begin()
        for partition, part in self._parts.items():
            if part.position is None:
                continue
            for record, reason, error in part.fold.unreadable:
                if record.offset not in part.fold.refused:
                    part.dead[record.offset] = dead_letter(record, ROLE, reason, error)
            part.fold.unreadable.clear()
            chosen = list(takewhile(lambda item: self._budget.takes(item[1].size), part.fold.ready(now)))
            dead = list(takewhile(lambda item: self._budget.takes(len(item[1].value or b"")), part.dead.items()))
            work.decisions.extend((partition, rollout_id, decision) for rollout_id, decision in chosen)
            work.dead.extend((partition, offset, letter) for offset, letter in dead)
            # From here a successor has to read, to know what this adapter knows.
            oldest = part.fold.oldest_open({rollout_id for rollout_id, _ in chosen})
            left = min(part.dead.keys() - {offset for offset, _ in dead}, default=part.position)
            offset = min(part.position, left) if oldest is None else min(part.position, left, oldest)
            # Written also if it has not moved: the offset fences this member if the partition has been reassigned, and
            # makes the new owner wait for the end of this transaction.
            if offset > part.committed or chosen or dead:
                work.offsets[partition] = offset
        if not work.decisions and not work.dead and not work.offsets:
            return False
        began = self._clock()
        try:
            await self._writer.write(work, self._group)
        except Unwritable as error:
            await self._writer.abort()
            self._metrics.reduced()
            self._reduce(error)
        except TransactionAborted as error:
            # Nothing is rewound: the decisions stay, and are sent again unless their partition is lost meanwhile.
            self._metrics.aborted()
            logger.warning("transaction aborted, its decisions are sent again: %s", error)
            if isinstance(error, RefusedTogether):
                self._budget.one()
            else:
                self._budget.halve()
            await self._writer.abort()
            await self._read()  # runs the rebalance callbacks: lost partitions go before the metadata are taken again
            self._group = self._consumer.group_metadata()
            return False
        else:
            took_s = self._clock() - began
            self._budget.committed(took_s)
            self._written(work, took_s)
        return True

    def _reduce(self, error: Unwritable) -> None:
        """Drops what can't be written, and keeps the outcome."""
        part = self._parts[error.partition]
        if error.rollout_id is not None:
            if not part.fold.unwritable(error.rollout_id, str(error)):
                fields = rollout_fields(error.rollout_id)
                logger.error("the end of rollout %s can't be written: %s", error.rollout_id, error, extra=fields)
        elif (letter := part.dead[error.offset]).value is not None:
            part.dead[error.offset] = without_body(letter)
        else:
            logger.error("the dead letter of %s@%d can't be written: %s", error.partition, error.offset, error)
            del part.dead[error.offset]

    def _written(self, work: Transaction, took_s: float) -> None:
        self._metrics.committed(work, took_s)
        for partition, rollout_id, _ in work.decisions:
            if part := self._parts.get(partition):
                part.fold.written(rollout_id)
        for partition, at, _ in work.dead:
            if part := self._parts.get(partition):
                part.dead.pop(at, None)
        for partition, offset in work.offsets.items():
            if part := self._parts.get(partition):
                part.committed = offset
