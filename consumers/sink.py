"""The sink: everything that lies on the topics, into the store.

At least once: rows first, then the commit. What is read twice has the same identity, and the tables collapse it; a
retried insert carries the same deduplication token. Between poll and commit a batch is held per partition, so that what
belongs to a lost partition can be dropped: its new owner reads it again.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from millstream.consumers.dead import dead_letter, letter_key
from millstream.consumers.port import Log
from millstream.consumers.rows import Rows, Unusable, to_rows
from millstream.producers.port import Producer, send_acknowledged
from millstream.schemas.errors import CodecError, LogError, LogUnavailable, StoreError, TooLarge, TransactionAborted
from millstream.schemas.log import KIND_HEADER, EndOfPartition, LogRecord, Partition
from millstream.schemas.settings import Settings

logger = logging.getLogger(__name__)

FLUSH_S = 1.0  # how old a row may get before it is inserted; an insert costs some 10 ms of CPU however small it is
FLUSH_BYTES = 32 << 20  # encoded records held at most, beside the limit on rows
POLL_RECORDS = 1000
POLL_S = 0.2
REST_S = 0.02  # after a poll that found little: the sink is in no hurry, and others need the CPU
RETRY_S = 0.2  # first wait after the store or the log failed; doubles
RETRY_MAX_S = 10.0
LOG_EVERY_S = 10.0  # between warnings of the same outage
DRAIN_S = 15.0  # at most, at the end: longer than a transaction that somebody left open


class RowsRefused(StoreError):
    """A value can't be what its column holds: sending it again can't help."""


class Inserter(Protocol):
    """Where the rows go; `pipeline.store.Store` is one. Called from one worker thread at a time."""

    def insert(self, table: str, column_names: Sequence[str], columns: Sequence[Sequence[Any]], token: str) -> None:
        """Stores all of the rows or none. A repeated ``token`` may be dropped. Raises `RowsRefused`, or `StoreError`
        if it may help to try again."""


@dataclass(slots=True)
class SinkStats:
    """What a sink has done since it started."""

    records: int = 0  # inserted and committed
    rows: int = 0
    flushes: int = 0
    unusable: int = 0  # records that could not be decoded or stored, on any topic
    dead_letters: int = 0
    retries: int = 0


class Sink:
    """Reads every topic as a member of the group ``PREFIX.sink``."""

    def __init__(
        self,
        log: Log,
        insert: Inserter,
        settings: Settings,
        *,
        flush_s: float = FLUSH_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        topics = settings.topics
        self._log = log
        self._insert = insert
        self._flush_s = flush_s
        self._clock = clock
        self._batch_size = settings.span_batch_size
        self._events = topics.events
        self._dead = topics.dead
        self._topics = [topic.name for topic in topics.all]
        self._consumer = log.consumer(f"{topics.prefix}.sink")
        self._producer: Producer | None = None  # made for the first dead letter
        self._held: dict[Partition, list[LogRecord]] = {}  # polled and not yet inserted
        self._held_records = self._held_bytes = 0
        self._held_since = 0.0
        self._uncommitted: dict[Partition, int] = {}  # inserted; next offsets
        self._joined = False
        self._warned = -LOG_EVERY_S
        self.stats = SinkStats()

    # RebalanceListener: called within poll, must not block.

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        self._forget(partitions)
        self._joined = True

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        self._forget(partitions)
        self._joined = bool(self._consumer.assignment() - set(partitions))  # if all are gone, more are to come

    def _forget(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._held.pop(partition, None)
            self._uncommitted.pop(partition, None)
        self._held_records = sum(map(len, self._held.values()))
        self._held_bytes = sum(map(_size, (record for records in self._held.values() for record in records)))

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until ``stop``; then inserts and commits what the log holds by that time, and leaves."""
        try:
            await self._consumer.subscribe(self._topics, self)
            while not stop.is_set():
                await self._read()
                if self._due():
                    await self._flush(stop)
            await self._drain()
        finally:
            await self._consumer.close()
            if self._producer is not None:
                await asyncio.to_thread(self._producer.close)

    def _due(self) -> bool:
        return self._held_records > 0 and (
            self._held_records >= self._batch_size
            or self._held_bytes >= FLUSH_BYTES
            or self._clock() - self._held_since >= self._flush_s
        )

    async def _read(self) -> None:
        before = self._held_records
        await self._poll(min(POLL_S, self._flush_s))
        if self._held_records - before < POLL_RECORDS // 2 and not self._due():
            await asyncio.sleep(REST_S)

    async def _poll(self, timeout_s: float) -> None:
        room = max(1, min(POLL_RECORDS, self._batch_size - self._held_records))
        try:
            batch = await self._consumer.poll(room, timeout_s)
        except LogUnavailable as error:
            self._warn("the log can't be read, trying again: %s", error)
            await asyncio.sleep(RETRY_S)
            return
        for item in batch:
            if isinstance(item, EndOfPartition):
                continue
            if not self._held_records:
                self._held_since = self._clock()
            self._held.setdefault(item.partition, []).append(item)
            self._held_records += 1
            self._held_bytes += _size(item)

    async def _flush(self, stop: asyncio.Event | None) -> None:
        """Inserts and commits what is held; tries until it succeeds, or ``stop`` (what is held then stays so)."""
        wait_s = RETRY_S
        while self._held_records:
            held = dict(self._held)
            try:
                await self._store(held)
                break
            except (StoreError, LogError) as error:
                self.stats.retries += 1
                self._warn("%d records wait, trying again: %s", self._held_records, error)
            if not await self._wait(wait_s, stop):
                return
            wait_s = min(2 * wait_s, RETRY_MAX_S)
        await self._commit()

    async def _store(self, held: dict[Partition, list[LogRecord]]) -> None:
        """One insert per table, and the dead letters. Afterwards nothing of it is held."""
        rows, unusable = await asyncio.to_thread(self._insert_all, held)
        for item in unusable:
            # What can't be decoded on the events topic is the adapter's to put away: it reads that too.
            if item.reason != "undecodable" or item.record.partition.topic != self._events:
                await self._bury(item)
        self.stats.unusable += len(unusable)
        for partition, records in held.items():
            if self._held.pop(partition, None) is not None:  # else it was lost meanwhile
                self._uncommitted[partition] = records[-1].offset + 1
                self.stats.records += len(records)
        self._held_records = sum(map(len, self._held.values()))
        self._held_bytes = 0
        self.stats.rows += rows
        self.stats.flushes += 1

    def _insert_all(self, held: dict[Partition, list[LogRecord]]) -> tuple[int, list[Unusable]]:
        """In a worker thread: decodes, converts, inserts. Returns the number of rows and what could not be stored."""
        records = [record for part in held.values() for record in part]
        tables, unusable = to_rows(records, self._events)
        token = _token(held)
        for rows in tables:
            for place, error in self._insert_rows(rows, f"{rows.table} {token}"):
                record = next(r for r in records if (*r.partition, r.offset) == place)
                unusable.append(Unusable(record, "unstorable", error))
        return sum(map(len, tables)), unusable

    def _insert_rows(self, rows: Rows, token: str) -> Iterator[tuple[tuple[Any, ...], str]]:
        """Inserts, by halves where something is refused; yields the place of each row that can't be stored."""
        try:
            self._insert.insert(rows.table, rows.column_names, rows.columns, token)
        except RowsRefused as error:
            if len(rows) == 1:
                yield rows.place(0), str(error)
                return
            half = len(rows) // 2
            yield from self._insert_rows(rows.cut(0, half), f"{token} <{half}")
            yield from self._insert_rows(rows.cut(half, len(rows)), f"{token} >={half}")

    async def _bury(self, item: Unusable) -> None:
        """Raises `LogError` unless the dead letter is acknowledged."""
        if self._producer is None:
            self._producer = self._log.producer()
        try:
            letter = dead_letter(item.record, "sink", item.reason, item.error)
        except CodecError:  # a live record that has no encoding either
            letter = dead_letter(replace(item.record, value=b""), "sink", item.reason, item.error)
        headers = {KIND_HEADER: letter.reason.encode()}
        try:
            await send_acknowledged(self._producer, self._dead, letter, key=letter_key(letter), headers=headers)
        except TooLarge:  # with its wrapping; the original stays where it is, and the letter says where
            letter = replace(letter, value=None, headers={})
            await send_acknowledged(self._producer, self._dead, letter, key=letter_key(letter), headers=headers)
        self.stats.dead_letters += 1

    async def _commit(self) -> None:
        if not self._uncommitted:
            return
        try:
            await self._consumer.commit(self._uncommitted)
        except TransactionAborted as error:
            logger.info("a partition was lost before its commit; its new owner inserts the same rows again: %s", error)
            # Those that are still ours are committed with what comes next.
        except LogUnavailable as error:
            self._warn("offsets are not committed, trying again with the next: %s", error)
            return
        self._uncommitted.clear()

    async def _wait(self, seconds: float, stop: asyncio.Event | None) -> bool:
        """Before another try. Stays in the group: polls, with everything paused. False if it is time to stop."""
        deadline = self._clock() + seconds
        try:
            while (left := deadline - self._clock()) > 0:
                if stop is not None and stop.is_set():
                    return False
                self._consumer.pause(self._consumer.assignment())
                await self._poll(min(left, POLL_S))
        finally:
            self._consumer.resume(self._consumer.assignment())
        return True

    async def _drain(self) -> None:
        """Reads to the ends as they are now, inserts and commits; for `DRAIN_S` at most, nothing is lost by that."""
        try:
            async with asyncio.timeout(DRAIN_S):
                while not await self._drained():
                    pass
        except (TimeoutError, LogUnavailable) as error:
            logger.warning(
                "stopped before the end of the log, %d records unstored; the next sink goes on there: %s",
                self._held_records,
                str(error) or f"{DRAIN_S:g} s were not enough",
            )

    async def _drained(self) -> bool:
        """Reads, inserts and commits once. False if there is more to do: partitions came, or our own dead letters."""
        while not self._joined:
            await self._poll(POLL_S)
        mine, buried = self._consumer.assignment(), self.stats.dead_letters
        ends = await self._consumer.end_offsets(mine)
        while not all(self._reached(partition, end) for partition, end in ends.items()):
            await self._poll(POLL_S)
            if self._due():
                await self._flush(None)
        await self._flush(None)
        return self._joined and self._consumer.assignment() <= mine and self.stats.dead_letters == buried

    def _reached(self, partition: Partition, end: int) -> bool:
        """Also if the partition has been lost."""
        position = self._consumer.position(partition) if partition in self._consumer.assignment() else end
        return position is not None and position >= end

    def _warn(self, message: str, *args: object) -> None:
        if self._clock() - self._warned >= LOG_EVERY_S:
            self._warned = self._clock()
            logger.warning(message, *args)


def _size(record: LogRecord) -> int:
    return len(record.value) if isinstance(record.value, bytes) else 0


def _token(held: dict[Partition, list[LogRecord]]) -> str:
    """Both ends of each range: the same token with other rows would drop them. With their timestamps, because a log
    that is made anew begins at offset 0 again."""
    return " ".join(
        f"{partition}:{part[0].offset}@{part[0].timestamp}-{part[-1].offset}@{part[-1].timestamp}"
        for partition, part in sorted(held.items())
    )
