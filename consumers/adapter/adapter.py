"""The adapter: the one that decides how every rollout ends, as a transactional stream processor over ``events``.

What it decides stands in `settle`; here are the reading and the writing, with every way they fail. One transaction
holds the triplets and ends, the marks on ``events`` itself, the dead letters and the input offsets, so a decision is
made once whatever dies. After an assignment each partition is read twice: for the marks of earlier decisions up to the
high watermark, then again to fold. ARCHITECTURE.md, "The adapter", tells why each step is there.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from itertools import islice
from typing import TypeVar

from millstream.consumers.adapter.settle import ROLE, Decision, PartitionFold
from millstream.consumers.adapter.triplets import ToTriplets, to_triplets
from millstream.consumers.dead_letters import dead_letter, letter_key, send_dead_letter
from millstream.consumers.log.port import Log
from millstream.schemas.errors import CodecError, LogUnavailable, TooLarge, TransactionAborted
from millstream.schemas.wire import status
from millstream.schemas.wire.log import KIND_HEADER, EndOfPartition, LogRecord, Partition
from millstream.schemas.wire.records import DeadLetter, Record
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)

POLL_RECORDS = 1000
POLL_S = 0.05
TRANSACTION_S = 0.05  # between transactions: decisions are written together
TRANSACTION_ROLLOUTS = 500  # in one transaction; keeps it far below transaction.timeout.ms
OFFSETS_S = 2.0  # between transactions that only move offsets
CALL_S = 5.0  # one try of a call to the log; it is repeated
# When a broker dies, librdkafka (2.16) can lose the answer to a transaction's call, which then never returns, whatever
# its time-out: only another process can go on. The broker has long since ended that transaction.
LOST_CALL_S = 2 * CALL_S
PROBE_S = 0.5  # between watermark probes; while none succeeds, no lease runs out
STALL_S = 1.0  # a gap in our own loop after which leases start anew: we were frozen, not they silent
PROCESS_BYTES = 1 << 30  # of open rollouts; beyond it the largest fails
HORIZON_S = 300.0  # the committed offset stays this far behind, so that late claims of ended rollouts are recognised

T = TypeVar("T")
Send = Callable[..., None]  # `Producer.send`, with an ``on_ack``


class _Phase(Enum):
    NEW = auto()  # assigned; nothing read yet
    SCAN = auto()  # first pass, for marks
    FOLD = auto()  # second pass, and from then on


@dataclass(slots=True)
class _Part:
    fold: PartitionFold
    phase: _Phase = _Phase.NEW
    start: int = 0
    high_watermark: int = 0
    position: int = 0
    caught_up_since: float | None = None
    committed: int = -1
    horizon: deque[tuple[float, int]] = field(default_factory=deque)  # (time folded, offset), one a second
    dead: dict[int, DeadLetter] = field(default_factory=dict)  # by offset, not yet written


@dataclass(frozen=True, slots=True)
class _Transaction:
    """What is written at once."""

    decisions: list[tuple[Partition, str, Decision]] = field(default_factory=list)  # with their rollouts
    dead: list[tuple[Partition, int, DeadLetter]] = field(default_factory=list)  # with their records' offsets
    offsets: dict[Partition, int] = field(default_factory=dict)


@dataclass(slots=True)
class AdapterStats:
    """What an adapter has done since it started. What a restart or a rebalance makes it read again counts again in
    ``ignored``, and nowhere else."""

    ended: int = 0
    retries: Counter[str] = field(default_factory=Counter)  # by the status of the attempt that is made again
    lost_attempts: int = 0  # attempts that were lost, made again or not
    transactions: int = 0
    aborted: int = 0
    dead_letters: int = 0
    ignored: Counter[str] = field(default_factory=Counter)  # late_event, late_span, zombie_result

    @property
    def zombie_results_ignored(self) -> int:
        """Successes that came too late: the attempt had been given up, or another one had ended the rollout."""
        return self.ignored["zombie_result"]


class Adapter:
    """Settles every rollout whose events lie on the partitions it owns.

    ``to_triplets`` is the pure part that users may replace. ``clock`` counts seconds.
    """

    def __init__(
        self,
        log: Log,
        topics: Topics,
        *,
        transactional_id: str,
        to_triplets: ToTriplets = to_triplets,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._topics = topics
        self._to_triplets = to_triplets
        self._clock = clock
        self._consumer = log.transactional_consumer(f"{topics.prefix}.adapter")
        self._producer = log.transactional_producer(transactional_id)
        self._parts: dict[Partition, _Part] = {}
        self._group: object = None
        self._not_before = clock()
        self._ready = asyncio.Event()
        self._called: float | None = None
        self.stats = AdapterStats()

    # RebalanceListener: called within poll, must not block.

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._parts[partition] = _Part(PartitionFold(self._to_triplets, ignored=self.stats.ignored))
        # Only here: metadata taken just before a transaction would let a zombie commit another member's partitions.
        self._group = self._consumer.group_metadata()
        self._ready.set()

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._parts.pop(partition, None)

    async def wait_ready(self) -> None:
        """Until the group has given this member its first assignment."""
        await self._ready.wait()

    @property
    def call_s(self) -> float:
        """For how long the transaction's call under way has not returned; beyond `LOST_CALL_S` it never will."""
        called = self._called
        return 0.0 if called is None else time.monotonic() - called

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until ``stop``, then finishes what has been decided. Raises `Fenced` if another adapter has taken this
        one's transactional id: the process should exit and be restarted by its supervisor."""
        try:
            await self._call(lambda: self._producer.init_transactions(CALL_S))
            await self._consumer.subscribe([self._topics.events], self)
            await self._loop(stop)
            while await self._write(self._clock()):
                pass
        finally:
            await self._consumer.close()
            await asyncio.to_thread(self._producer.close)

    async def _loop(self, stop: asyncio.Event) -> None:
        last = written = probed = self._clock()
        while not stop.is_set():
            await self._read()
            now = self._clock()
            if now - last > STALL_S:
                self._not_before = now
            last = now
            if now - probed > PROBE_S:
                probed = now
                if await self._probe():
                    self._expire(now)
                else:
                    self._not_before = self._clock()
            since = now - written
            if since >= OFFSETS_S or (since >= TRANSACTION_S and self._decided(now)):
                written = now
                await self._write(now)

    def _decided(self, now: float) -> bool:
        return any(part.dead or next(part.fold.ready(now), None) for part in self._parts.values())

    async def _read(self) -> None:
        try:
            batch = await self._consumer.poll(POLL_RECORDS, POLL_S)
        except LogUnavailable as error:
            logger.warning("events can't be read, trying again: %s", error)
            await asyncio.sleep(POLL_S)
            return
        now = self._clock()
        skip: set[Partition] = set()  # sought elsewhere: the rest of the batch is not theirs any more
        for item in batch:
            part = self._parts.get(item.partition)
            if part is None or item.partition in skip:
                continue
            if part.phase is _Phase.NEW and not await self._begin(part, item):
                skip.add(item.partition)
            elif part.phase is _Phase.SCAN:
                if await self._scan(part, item):
                    skip.add(item.partition)
            elif isinstance(item, EndOfPartition):
                part.position = max(part.position, item.offset)
            else:
                self._apply(part, item, now)
        self._bound_memory(now)

    def _bound_memory(self, now: float) -> None:
        folds = [part.fold for part in self._parts.values()]
        while sum(fold.size for fold in folds) > PROCESS_BYTES:
            fold = max(folds, key=PartitionFold.largest)
            size, rollout_id = fold.largest()
            message = f"{size:,} bytes, the most of all open rollouts; the adapter keeps {PROCESS_BYTES:,} in all"
            fold.too_large(rollout_id, message, time.time_ns(), now)

    async def _begin(self, part: _Part, item: LogRecord | EndOfPartition) -> bool:
        """At the first record: how far do marks have to be looked for? False if that can't be told now."""
        try:
            ends = await self._consumer.end_offsets([item.partition])
        except LogUnavailable:
            await self._consumer.seek(item.partition, item.offset)
            return False
        part.start = part.position = item.offset
        part.high_watermark = ends[item.partition]
        part.phase = _Phase.SCAN
        return True

    async def _scan(self, part: _Part, item: LogRecord | EndOfPartition) -> bool:
        """First pass. True when it is over and the partition has been sought back. An end that lies before the
        watermark is that of an open transaction, a predecessor's perhaps: what it decided has to be seen."""
        end = item.offset
        if isinstance(item, LogRecord):
            part.fold.scan(item)
            end += 1
        if end < part.high_watermark:
            return False
        part.phase = _Phase.FOLD
        await self._consumer.seek(item.partition, part.start)
        return True

    def _apply(self, part: _Part, record: LogRecord, now: float) -> None:
        try:
            part.fold.apply(record, now)
        except CodecError as error:
            if record.offset not in part.fold.refused:
                part.dead[record.offset] = dead_letter(record, ROLE, "undecodable", str(error))
        part.position = record.offset + 1
        if not part.horizon or now - part.horizon[-1][0] >= 1.0:
            part.horizon.append((now, record.offset))

    async def _probe(self) -> bool:
        """Whether the log answers for every partition. Notes which of them we read as fast as they are written: a
        heartbeat that lies in the log unread must not end its attempt."""
        partitions = [p for p, part in self._parts.items() if part.phase is _Phase.FOLD]
        try:
            ends = await self._consumer.end_offsets(partitions) if partitions else {}
        except LogUnavailable as error:
            logger.warning("the log doesn't answer; no lease runs out meanwhile: %s", error)
            return False
        for partition, end in ends.items():
            if part := self._parts.get(partition):
                if part.position < part.high_watermark:
                    part.caught_up_since = None
                elif part.caught_up_since is None:
                    part.caught_up_since = self._clock()
                part.high_watermark = end  # what has to be read by the next probe
        return True

    def _expire(self, now: float) -> None:
        for part in self._parts.values():
            if part.caught_up_since is not None:
                part.fold.expire(now, max(self._not_before, part.caught_up_since), time.time_ns())

    async def _write(self, now: float) -> bool:
        """One transaction: up to `TRANSACTION_ROLLOUTS` decisions, the dead letters, the offsets. False if there was
        nothing to write."""
        work = _Transaction()
        for partition, part in self._parts.items():
            if part.phase is not _Phase.FOLD:
                continue
            for record, reason, error in part.fold.unreadable:
                if record.offset not in part.fold.refused:
                    part.dead[record.offset] = dead_letter(record, ROLE, reason, error)
            part.fold.unreadable.clear()
            chosen = list(islice(part.fold.ready(now), TRANSACTION_ROLLOUTS - len(work.decisions)))
            work.decisions.extend((partition, rollout_id, decision) for rollout_id, decision in chosen)
            work.dead.extend((partition, offset, letter) for offset, letter in part.dead.items())
            offset = self._committable(part, {rollout_id for rollout_id, _ in chosen}, now)
            # Also where it stands still: the offset is what fences us where the partition is another member's by now,
            # and what makes that member wait for the end of this transaction.
            if offset > part.committed or chosen or part.dead:
                work.offsets[partition] = offset
        if not work.decisions and not work.dead and not work.offsets:
            return False
        try:
            await asyncio.to_thread(self._commit, work)
        except _Oversized as error:
            await self._call(lambda: self._producer.abort_transaction(CALL_S))
            self._parts[error.partition].fold.oversized(error.rollout_id, str(error))
        except TransactionAborted as error:
            # Nothing is rewound: the decisions stay, and are sent again unless their partition is lost meanwhile.
            self.stats.aborted += 1
            logger.warning("transaction aborted, its decisions are sent again: %s", error)
            await self._call(lambda: self._producer.abort_transaction(CALL_S))
            await self._read()  # serves the callbacks: what is lost is dropped before the metadata are taken anew
            self._group = self._consumer.group_metadata()
        else:
            self._written(work)
        return True

    def _written(self, work: _Transaction) -> None:
        self.stats.transactions += 1
        self.stats.dead_letters += len(work.dead)
        for partition, rollout_id, decision in work.decisions:
            if decision.retry is None:
                self.stats.ended += 1
                self.stats.dead_letters += len(decision.dead)
            else:
                self.stats.retries[decision.how] += 1
            self.stats.lost_attempts += decision.how == status.LOST
            if part := self._parts.get(partition):
                part.fold.written(rollout_id, part.position)
        for partition, at, _ in work.dead:
            if part := self._parts.get(partition):
                part.dead.pop(at, None)
        for partition, offset in work.offsets.items():
            if part := self._parts.get(partition):
                part.committed = offset
                part.fold.prune(offset)

    def _committable(self, part: _Part, in_flight: set[str], now: float) -> int:
        """The offset that a successor has to begin at to know what we know."""
        while len(part.horizon) > 1 and part.horizon[1][0] <= now - HORIZON_S:
            part.horizon.popleft()
        held = [part.position]
        if part.horizon:
            held.append(part.horizon[0][1])
        if (oldest := part.fold.oldest_open(in_flight)) is not None:
            held.append(oldest)
        return min(held)

    def _commit(self, work: _Transaction) -> None:
        """Runs in a thread; polls nothing meanwhile. Raises `TransactionAborted` and `_Oversized`; any other outcome is
        a commit, or the end of this process."""
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
                raise _Oversized(partition, rollout_id, error) from error
        for partition, _, letter in work.dead:
            send_dead_letter(send, self._topics, letter)
            mark, headers = replace(letter, value=None, headers={}), {KIND_HEADER: b"dead"}
            send(self._topics.events, mark, key=letter_key(letter), partition=partition.number, headers=headers)
        # Flushed before the offsets: else outputs could land behind the watermark that a successor reads up to.
        self._repeat(lambda: self._producer.flush(CALL_S))
        if failed:
            raise TransactionAborted(f"{len(failed)} records of it were refused, the first: {failed[0]}")
        if work.offsets:
            self._repeat(lambda: self._producer.send_offsets(work.offsets, self._group, CALL_S))
        self._repeat(lambda: self._producer.commit_transaction(CALL_S))

    def _send_decision(self, send: Send, number: int, rollout_id: str, decision: Decision) -> None:
        def place(topic: str, value: Record, kind: str) -> None:
            """The partition is that of the events, said outright: triplets lie beside what they were made from."""
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
        """The same call again while its outcome is unknown: after a commit that timed out nothing else may follow."""
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


class _Oversized(Exception):
    """A decision holds a record larger than the topics take."""

    def __init__(self, partition: Partition, rollout_id: str, error: TooLarge) -> None:
        super().__init__(f"too_large: {error}")
        self.partition = partition
        self.rollout_id = rollout_id
