"""The sink role: stores all records of all topics in a `Sink`.

At least once: it stores a batch, then commits. While one batch is stored, the next is gathered; when that is full, too,
the role pauses its partitions and keeps polling, so that it stays in its group however long the store is down. A retry
repeats exactly the same batch. Offsets of a lost partition are not committed; its new owner stores those records again.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from millstream.consumers.dead_letters import dead_letter, write_dead_letter
from millstream.consumers.log.port import Log
from millstream.consumers.sink.port import Batch, Sink, Unusable
from millstream.producers.instruments import counter, histogram
from millstream.producers.log.port import Producer
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas import metrics
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import LogError, StoreError, TransactionAborted
from millstream.schemas.wire.log import LogRecord, Partition, age_s

logger = logging.getLogger(__name__)

REASONS: Final = ("undecodable", "unstorable")  # as labels; a sink of one's own may give any others


@dataclass(frozen=True, slots=True)
class FlushPolicy:
    """When a batch is stored: at whichever limit it reaches first."""

    rows: int  # records, to be exact: a claim makes two rows
    bytes: int = 32 << 20  # encoded
    age_s: float = 1.0  # of its first record; an insert costs some 10 ms of CPU however small it is


@dataclass(frozen=True, slots=True)
class PollPolicy:
    records: int = 1000  # at once
    wait_s: float = 0.2
    idle_s: float = 0.02  # after a poll that found little: the sink is in no hurry, and others need the CPU
    measure_s: float = 5.0  # between two looks at the ends of its partitions; Prometheus asks every ten seconds


@dataclass(frozen=True, slots=True)
class OutagePolicy:
    """How failures of the store or the log are retried and reported."""

    retry_s: float = 0.2  # upper bound of the first pause; doubles with each retry, up to:
    retry_max_s: float = 10.0
    slow_s: float = 10.0  # a batch that takes longer counts as an outage
    log_every_s: float = 10.0  # between two warnings


@dataclass(slots=True)
class SinkStats:
    """What a sink has done since it started."""

    records: int = 0  # stored
    flushes: int = 0
    unusable: int = 0  # records that could not be decoded or stored, on any topic
    dead_letters: int = 0
    retries: int = 0


@dataclass(slots=True)
class _Gathered:
    """Records that have been read and are not yet being stored."""

    parts: dict[Partition, list[LogRecord]] = field(default_factory=dict)
    records: int = 0
    bytes: int = 0
    since: float = 0.0
    oldest_ms: int = 0  # timestamp of the oldest of the first records, ms since the epoch

    def add(self, record: LogRecord) -> None:
        self.parts.setdefault(record.partition, []).append(record)
        self.records += 1
        self.bytes += _size(record)

    def forget(self, partition: Partition) -> None:
        lost = self.parts.pop(partition, ())
        self.records -= len(lost)
        self.bytes -= sum(map(_size, lost))

    def batch(self) -> Batch:
        return Batch([record for part in self.parts.values() for record in part], _token(self.parts))


class SinkRole:
    """Reads every topic as a member of the group ``PREFIX.sink[.NAME]``: each name gets all records, and sinks of the
    same name share them.

    ``registry`` gets its metrics. ``drain_s``: how long it reads on to the end of the log when it is stopped. The
    default is longer than an open transaction holds up readers."""

    def __init__(
        self,
        log: Log,
        sink: Sink,
        settings: Settings,
        *,
        name: str = "",
        registry: CollectorRegistry | None = None,
        flush: FlushPolicy | None = None,
        poll: PollPolicy = PollPolicy(),
        outage: OutagePolicy = OutagePolicy(),
        drain_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._topics = settings.topics
        self._log = log
        self._sink = sink
        self._flush = flush or FlushPolicy(settings.span_batch_size)
        self._poll_policy = poll
        self._outage = outage
        self._drain_s = drain_s
        self._clock = clock
        self.group = ".".join(filter(None, (self._topics.prefix, "sink", name)))
        self._consumer = log.consumer(self.group)
        registry = registry or CollectorRegistry()
        self._insert_s = histogram(metrics.SINK_INSERT_SECONDS, registry)
        self._dead = counter(metrics.DEAD_LETTERS, registry)
        self._producer: Producer | None = None  # made for the first dead letter
        self._gathered = _Gathered()
        self._delivery: Background | None = None
        self._delivering = 0  # records
        self._delivering_since = 0.0
        self._delivering_ms = 0  # as `_Gathered.oldest_ms`
        self._in_flight: dict[Partition, int] = {}  # next offsets, once the delivery is done
        self._uncommitted: dict[Partition, int] = {}  # stored; next offsets
        self._failure: Exception | None = None  # of the delivery's last try
        self._paused: set[Partition] = set()
        self._joined = False
        self._warned: float | None = None
        self._ends: dict[Partition, int] = {}  # of its partitions, when it last looked
        self._measured = -math.inf
        self.stats = SinkStats()

    @property
    def waiting(self) -> int:
        """Records that have been read and are not stored yet."""
        return self._gathered.records + self._delivering

    @property
    def lag_s(self) -> float:
        """Age of the oldest record that has been read and is not stored; 0 without any. From any thread."""
        times = [self._delivering_ms if self._delivering else 0, self._gathered.oldest_ms]
        return age_s(min((time_ms for time_ms in times if time_ms), default=None))

    @property
    def lag_records(self) -> int:
        """Records of its partitions that are not stored, up to the ends of a few seconds ago. From any thread."""
        positions = {partition: self._consumer.position(partition) for partition in self._ends}
        unread = sum(max(self._ends[partition] - at, 0) for partition, at in positions.items() if at is not None)
        return unread + self.waiting

    @property
    def outage_s(self) -> float:
        """Seconds for which the store has been failing or slow; 0 if it is neither."""
        if self._delivery is None:
            return 0.0
        took = self._clock() - self._delivering_since
        return took if self._failure is not None or took > self._outage.slow_s else 0.0

    @property
    def trouble(self) -> str | None:
        """Why records are not being stored, as a text; None if they are."""
        if not (seconds := self.outage_s):
            return None
        why = self._failure or "the store does not answer"
        return f"{self.waiting} records have been waiting for {seconds:.0f} s: {why}"

    # RebalanceListener: called within poll, must not block.

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        self._forget(partitions)
        self._joined = True

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        self._forget(partitions)
        self._joined = bool(self._consumer.assignment() - set(partitions))  # if all are gone, more are to come

    def _forget(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._gathered.forget(partition)
            self._in_flight.pop(partition, None)
            self._uncommitted.pop(partition, None)
            self._paused.discard(partition)

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until ``stop``; then stores and commits what the log holds by that time, and leaves the group."""
        try:
            await self._consumer.subscribe([topic.name for topic in self._topics.stored], self)
            while not stop.is_set():
                await self._step()
            await self._drain()
        finally:
            if self._delivery is not None:
                await self._delivery.close()
            await self._consumer.close()
            if self._producer is not None:
                await asyncio.to_thread(self._producer.close)

    async def _step(self) -> None:
        if self._delivery is not None and self._full():
            await self._hold()
        else:
            await self._gather()
        await self._settle()
        if self._delivery is None and self._due():
            self._deliver()
        if self._clock() - self._measured >= self._poll_policy.measure_s:
            await self._measure()

    async def _measure(self) -> None:
        """Looks at the ends of its partitions."""
        try:
            self._ends = await self._consumer.end_offsets(self._consumer.assignment())
        except LogError as error:
            await self._consumer.polls.sit_out(error, self._warn, "the lag can't be measured, retrying: %s")
        self._measured = self._clock()

    def _full(self) -> bool:
        return self._gathered.records >= self._flush.rows or self._gathered.bytes >= self._flush.bytes

    def _due(self) -> bool:
        old = self._clock() - self._gathered.since >= self._flush.age_s
        return self._gathered.records > 0 and (old or self._full())

    async def _gather(self) -> None:
        if self._paused:
            self._consumer.resume(self._paused)
            self._paused.clear()
        before = self._gathered.records
        await self._poll(min(self._poll_policy.wait_s, self._flush.age_s))
        if self._gathered.records - before < self._poll_policy.records // 2 and not self._due():
            await asyncio.sleep(self._poll_policy.idle_s)

    async def _hold(self) -> None:
        """Waits briefly for the delivery. Polls with all partitions paused, to stay in the group."""
        assert self._delivery is not None
        if running := self._consumer.assignment() - self._paused:
            self._consumer.pause(running)
            self._paused |= running
        await asyncio.wait({self._delivery.task}, timeout=self._poll_policy.wait_s)
        await self._poll(0.0)

    async def _poll(self, timeout_s: float) -> None:
        room = max(1, min(self._poll_policy.records, self._flush.rows - self._gathered.records))
        try:
            batch = await self._consumer.poll(room, timeout_s)
        except LogError as error:
            text = "the log can't be read, retrying: %s"
            await self._consumer.polls.sit_out(error, self._warn, text, self._outage.retry_s)
            return
        if not self._gathered.records:
            self._gathered.since = self._clock()
            self._gathered.oldest_ms = min((record.timestamp for record in batch), default=0)
        for record in batch:
            self._gathered.add(record)

    def _deliver(self) -> None:
        """Begins to store what is gathered."""
        gathered, self._gathered = self._gathered, _Gathered()
        self._in_flight = {partition: part[-1].offset + 1 for partition, part in gathered.parts.items()}
        self._delivering_ms = gathered.oldest_ms
        self._delivering, self._delivering_since = gathered.records, self._clock()
        self._delivery = supervisor().job("delivery", self._store(gathered.batch()))

    async def _settle(self) -> None:
        """Commits what has been stored, if the delivery is done."""
        if self._delivery is None or not self._delivery.task.done():
            return
        if self._failure is not None:
            logger.info("the store takes records again, after %.0f s", self.outage_s)
        delivery, self._delivery, self._failure, self._delivering = self._delivery, None, None, 0
        delivery.task.result()
        self._uncommitted |= self._in_flight
        self._in_flight = {}
        await self._commit()

    async def _store(self, batch: Batch) -> None:
        """Retries until the batch is stored and its unusable records are dead letters."""
        unusable: list[Unusable] | None = None
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type((StoreError, LogError)),
            # Full jitter: sinks that failed together don't retry together.
            wait=wait_random_exponential(multiplier=self._outage.retry_s, max=self._outage.retry_max_s),
            before_sleep=self._failed,
        ):
            with attempt:
                if unusable is None:
                    unusable = await asyncio.to_thread(self._write, batch)
                    self.stats.unusable += len(unusable)
                while unusable:
                    await self._dead_letter(unusable[0])
                    del unusable[0]
        self.stats.records += len(batch.records)
        self.stats.flushes += 1

    def _write(self, batch: Batch) -> list[Unusable]:
        began = time.monotonic()
        unusable = self._sink.write(batch)
        self._sink.flush()
        self._insert_s.observe(time.monotonic() - began)
        return unusable

    def _failed(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert isinstance(error, Exception)
        self._failure = error
        self.stats.retries += 1
        self._warn("%d records are waiting, retrying: %s", self.waiting, error)

    async def _dead_letter(self, item: Unusable) -> None:
        """Raises `LogError` unless the dead letter is acknowledged."""
        if item.reason == "undecodable" and item.record.partition.topic == self._topics.events:
            return  # the adapter reads this topic, too, and sends the dead letter
        if self._producer is None:
            self._producer = self._log.producer()
        letter = dead_letter(item.record, "sink", item.reason, item.error)
        await write_dead_letter(self._producer, self._topics, letter)
        self.stats.dead_letters += 1
        self._dead.labels("sink", item.reason if item.reason in REASONS else "other").inc()

    async def _commit(self) -> None:
        if not self._uncommitted:
            return
        try:
            await self._consumer.commit(self._uncommitted)
        except TransactionAborted as error:
            logger.info(
                "a partition was lost before its commit; its new owner stores the same records again: %s", error
            )
            # The offsets of the other partitions are committed with the next batch.
        except LogError as error:
            text = "offsets are not committed, retrying with the next batch: %s"
            await self._consumer.polls.sit_out(error, self._warn, text)
            return
        self._uncommitted.clear()

    async def _drain(self) -> None:
        """Reads to the current end of the log, stores and commits. Nothing is lost if the time is not enough."""
        try:
            async with asyncio.timeout(self._drain_s):
                while not await self._drained():
                    pass
        except (TimeoutError, LogError) as error:
            logger.warning(
                "stopped before the end of the log with %d records not stored; the next sink continues there: %s",
                self.waiting,
                str(error) or f"{self._drain_s:g} s were not enough",
            )

    async def _drained(self) -> bool:
        """Reads, stores and commits once. False if there is more: new partitions, or dead letters of its own."""
        while not self._joined:
            await self._poll(self._poll_policy.wait_s)
        mine, dead_letters = self._consumer.assignment(), self.stats.dead_letters
        ends = await self._consumer.end_offsets(mine)
        while not all(self._reached(partition, end) for partition, end in ends.items()):
            await self._step()
        while self._delivery is not None or self._gathered.records:
            if self._delivery is None:
                self._deliver()
            await self._hold()
            await self._settle()
        return self._joined and self._consumer.assignment() <= mine and self.stats.dead_letters == dead_letters

    def _reached(self, partition: Partition, end: int) -> bool:
        """True as well if the partition has been lost."""
        position = self._consumer.position(partition) if partition in self._consumer.assignment() else end
        return position is not None and position >= end

    def _warn(self, message: str, *args: object) -> None:
        now = self._clock()
        if self._warned is None or now - self._warned >= self._outage.log_every_s:
            self._warned = now
            logger.warning(message, *args)


def _size(record: LogRecord) -> int:
    return len(record.value) if isinstance(record.value, bytes) else 0


def _token(parts: dict[Partition, list[LogRecord]]) -> str:
    """Both ends of each range, because ClickHouse drops a block with a known token even if its rows are others; with
    timestamps, because a log that was recreated begins at offset 0 again."""
    ranges = " ".join(
        f"{partition}:{part[0].offset}@{part[0].timestamp}-{part[-1].offset}@{part[-1].timestamp}"
        for partition, part in sorted(parts.items())
    )
    return hashlib.sha256(ranges.encode()).hexdigest()
