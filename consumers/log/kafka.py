"""The consumer port on Kafka, with aiokafka.

If a transactional producer commits the offsets, use `kafka_transactional.KafkaTransactionalConsumer`.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka import TopicPartition as AioPartition
from aiokafka.errors import (
    CommitFailedError,
    GroupAuthorizationFailedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    TopicAuthorizationFailedError,
)
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from millstream.consumers.log.kafka_offsets import Watermarks
from millstream.consumers.log.kafka_policy import ConsumerPolicy
from millstream.consumers.log.poll_times import PollTimes
from millstream.consumers.log.port import RebalanceListener
from millstream.producers.log.kafka_config import BATCH_OVERHEAD, aiokafka_config, limit_aiokafka_logs, missing_right
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import Denied, LogError, LogUnavailable, TransactionAborted
from millstream.schemas.wire.log import LogRecord, Partition

logger = logging.getLogger(__name__)


def record_key(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode("utf-8", "surrogateescape")


def place_to_continue(partition: Partition, wanted: int, first: int, end: int, group: str | None) -> tuple[int, int]:
    """Returns the offset to continue at, and how many offsets were deleted before they were read.

    ``wanted``: the next offset, negative if there is none yet. The partition holds ``first`` to ``end`` - 1. What is
    skipped or read again is logged.
    """
    who = f"group {group}" if group else "this process"
    if 0 <= wanted < first:
        logger.error(
            "%s: offsets %d to %d were deleted before %s read them. Rollouts with records there may be incomplete; "
            "those whose tasks or ends were there are missing. Is the retention longer than this role may be down?",
            partition,
            wanted,
            first - 1,
            who,
        )
        return first, first - wanted
    if wanted > end:
        logger.error(
            "%s ends at offset %d, but %s has read it up to %d: the topic was created again, or the brokers have lost "
            "records. It is read from its beginning; what has ended once does not end again",
            partition,
            end,
            who,
            wanted,
        )
        return first, 0
    return max(wanted, first), 0


class AioConsumer:
    """Rebalance callbacks run in the event loop as soon as the group decides: within ``poll``, or while the role awaits
    something else between two polls, so that a slow role does not delay the group."""

    def __init__(
        self,
        settings: Settings,
        watermarks: Watermarks,
        polls: PollTimes,
        group: str | None = None,
        policy: ConsumerPolicy = ConsumerPolicy(),
    ) -> None:
        self.polls = polls
        self._policy = policy
        self._settings = settings
        self._watermarks = watermarks
        self._group = group
        self._client: AIOKafkaConsumer | None = None
        self._subscribed: list[str] = []
        self._listener: RebalanceListener | None = None
        # Partitions that were reported to the listener, with the offset of the next record; None before the first.
        self._positions: dict[Partition, int | None] = {}
        self._first: dict[Partition, int] = {}  # that was handed out since the last rebalance
        self._changed = asyncio.Event()
        self._failure: Exception | None = None

    async def subscribe(self, topics: Sequence[str], listener: RebalanceListener | None = None) -> None:
        if self._group is None:
            raise LogError("subscribe needs a group: name one when you create the consumer")
        self._subscribed, self._listener = list(topics), listener
        await self._subscribe()

    async def _subscribe(self) -> AIOKafkaConsumer:
        client = await self._started()
        client.subscribe(topics=self._subscribed, listener=_Listener(self._on_assign, self._on_revoke))
        return client

    async def assign(self, partitions: Sequence[Partition], start: Literal["beginning", "end"] = "beginning") -> None:
        client = await self._started()
        first = await (self._watermarks.beginning if start == "beginning" else self._watermarks.stable_end)(partitions)
        client.assign([AioPartition(*p) for p in partitions])
        self._positions = {}
        for partition, offset in first.items():
            client.seek(AioPartition(*partition), offset)
            self._positions[partition] = offset

    async def poll(self, max_records: int, timeout_s: float, topics: Iterable[str] | None = None) -> list[LogRecord]:
        with self.polls:
            return await self._poll(max_records, timeout_s, topics)

    async def _poll(self, max_records: int, timeout_s: float, topics: Iterable[str] | None) -> list[LogRecord]:
        client = await self._subscribe() if self._client is None and self._subscribed else self._joined()
        wanted = None if topics is None else frozenset(topics)
        deadline = time.monotonic() + timeout_s
        await asyncio.sleep(0)  # a role that polls without waiting must not starve aiokafka's tasks
        while True:
            rest = max(0.0, deadline - time.monotonic())
            chosen: list[AioPartition] = []
            if wanted is not None:
                chosen = [tp for tp in client.assignment() if tp.topic in wanted]
                rest = min(rest, self._policy.slice_s)  # partitions of those topics may be assigned meanwhile
            if wanted is None or chosen:
                try:
                    got = await client.getmany(*chosen, timeout_ms=math.ceil(rest * 1000), max_records=max_records)
                except (OffsetOutOfRangeError, NoOffsetForPartitionError) as error:
                    await self._find_place(client, error)
                    continue
                except GroupAuthorizationFailedError as error:
                    # Its heartbeats have ended: it would say the same for ever. The next poll joins with a new client.
                    self._client = None
                    self._on_revoke()
                    await self._stop(client)
                    raise self._error(error, f"reading as {self._group}") from error
                except KafkaError as error:
                    raise self._error(error, f"reading as {self._group or 'a reader without a group'}") from error
                records = self._hand_out(client, got)
                if not records:
                    await self._check_topics(client)
                    await self._catch_up(client)
            else:
                records = []
                self._changed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), rest)
            if self._failure is not None:
                raise self._failure
            if records or time.monotonic() >= deadline:
                return records

    def _hand_out(self, client: AIOKafkaConsumer, got: Mapping[AioPartition, list[ConsumerRecord]]) -> list[LogRecord]:
        records: list[LogRecord] = []
        for tp, batch in got.items():
            partition = Partition(tp.topic, tp.partition)
            if partition not in self._positions:
                # aiokafka sets a new assignment before its callback: read these again after ``on_assign``.
                if tp in client.assignment():
                    client.seek(tp, batch[0].offset)
                continue
            records.extend(
                LogRecord(
                    partition,
                    r.offset,
                    r.timestamp,
                    record_key(r.key),
                    r.value or b"",
                    {name: value or b"" for name, value in r.headers},
                )
                for r in batch
            )
            self._first.setdefault(partition, batch[0].offset)
            self._positions[partition] = batch[-1].offset + 1
            self.polls.read_bytes += sum(r.serialized_value_size for r in batch)  # -1 without a value
        return records

    async def _find_place(self, client: AIOKafkaConsumer, error: KafkaError) -> None:
        """Continues where aiokafka found no place."""
        if isinstance(error, OffsetOutOfRangeError):
            wanted = {Partition(tp.topic, tp.partition): offset for tp, offset in error.args[0].items()}
        else:  # what aiokafka says of committed offsets may be wrong: see `Watermarks.committed`
            new = [partition for partition, position in self._positions.items() if position is None]
            wanted = {p: -1 if offset is None else offset for p, offset in (await self.committed(new)).items()}
        firsts, ends = await self._watermarks.beginning(wanted), await self._watermarks.end(wanted)
        for partition, offset in wanted.items():
            place, unread = place_to_continue(partition, offset, firsts[partition], ends[partition], self._group)
            self.polls.unread += unread
            with suppress(IllegalStateError):  # it has been lost meanwhile
                client.seek(AioPartition(*partition), place)

    async def _check_topics(self, client: AIOKafkaConsumer) -> None:
        """Raises `LogError` if a topic is denied: aiokafka only logs it, and leaves the topic out."""
        unseen = [topic for topic in client.subscription() if client.partitions_for_topic(topic) is None]
        await self._watermarks.beginning(Partition(topic, 0) for topic in unseen)

    async def _catch_up(self, client: AIOKafkaConsumer) -> None:
        """Updates positions without records: of empty partitions, and behind transaction markers."""
        for partition in list(self._positions):
            tp = AioPartition(*partition)
            if tp in client.assignment() and client.highwater(tp) is not None:  # fetched: the position is known
                self._positions[partition] = await client.position(tp)

    def _on_assign(self, assigned: Iterable[AioPartition]) -> None:
        partitions = sorted(Partition(tp.topic, tp.partition) for tp in assigned)
        self._positions, self._first = dict.fromkeys(partitions), {}
        self._notify("on_assign", partitions)

    def _on_revoke(self) -> None:
        gone, self._positions, self._first = sorted(self._positions), {}, {}
        if gone:
            self._notify("on_revoke", gone)

    def _notify(self, callback: str, partitions: list[Partition]) -> None:
        self._changed.set()
        try:
            if self._listener is not None:
                getattr(self._listener, callback)(partitions)
        except Exception as error:  # aiokafka would only log it: the next poll raises it
            self._failure = error

    def assignment(self) -> frozenset[Partition]:
        return frozenset(self._positions)

    def holds(self, partition: Partition, offset: int) -> bool:
        return partition in self._first and self._first[partition] <= offset

    def position(self, partition: Partition) -> int | None:
        return self._positions.get(partition)

    async def seek(self, partition: Partition, offset: int) -> None:
        try:
            self._joined().seek(AioPartition(*partition), offset)
        except IllegalStateError as error:
            raise LogError(f"seeking {partition} to {offset}: the partition is not assigned") from error
        self._positions[partition] = offset
        self._first.pop(partition, None)

    def pause(self, partitions: Iterable[Partition]) -> None:
        if mine := self._mine(partitions):
            self._joined().pause(*mine)

    def resume(self, partitions: Iterable[Partition]) -> None:
        if mine := self._mine(partitions):
            self._joined().resume(*mine)

    def _mine(self, partitions: Iterable[Partition]) -> list[AioPartition]:
        return [tp for tp in (AioPartition(*p) for p in partitions) if tp in self._joined().assignment()]

    async def commit(self, offsets: Mapping[Partition, int], timeout_s: float = 10.0) -> None:
        if not offsets:
            return
        lost = [str(p) for p, offset in offsets.items() if not self.holds(p, offset - 1)]
        if lost:
            # The brokers would take the offset, also where another member has committed a later one since.
            message = f"{', '.join(lost)} went to another member after these records were read"
            raise TransactionAborted(f"committing as {self._group}: {message}")
        try:
            async with asyncio.timeout(timeout_s):  # aiokafka itself retries forever
                await self._joined().commit({AioPartition(*p): OffsetAndMetadata(o, "") for p, o in offsets.items()})
        except (KafkaError, TimeoutError) as error:
            raise self._error(error, f"committing as {self._group}") from error

    async def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        if self._group is None:
            raise LogError("committed offsets belong to a group: name one when you create the consumer")
        return await self._watermarks.committed(self._group, partitions)

    async def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return await self._watermarks.end(partitions)

    async def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return await self._watermarks.beginning(partitions)

    async def offsets_since(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        return await self._watermarks.since(partitions, time_ms)

    async def close(self) -> None:
        self.polls.closed = True
        client, self._client, self._subscribed = self._client, None, []
        if client is None:
            return
        if self._listener is not None:
            self._on_revoke()
        await self._stop(client)

    async def _stop(self, client: AIOKafkaConsumer) -> None:
        # In a separate task: in an outage aiokafka lets the cancellation of its fetch escape, as if it were ours.
        stop = asyncio.ensure_future(client.stop())
        await asyncio.wait({stop}, timeout=self._policy.call_s)
        if not stop.done() or stop.cancelled() or stop.exception() is not None:
            stop.cancel()
            logger.warning("could not leave group %s gracefully; its session will expire", self._group)

    def _error(self, error: Exception, doing: str) -> LogError:
        message = f"{doing}: {type(error).__name__}: {error}"
        if isinstance(error, TopicAuthorizationFailedError | GroupAuthorizationFailedError):
            denied = [("group", str(self._group))]
            if isinstance(error, TopicAuthorizationFailedError):
                topics = [error.args[0]] if isinstance(error.args[0], str) else sorted(error.args[0])
                denied = [("topic", topic) for topic in topics]
            return Denied(f"{message}: {missing_right(self._settings, 'Read', *denied)}")
        if isinstance(error, CommitFailedError | IllegalStateError):
            return TransactionAborted(message)
        if isinstance(error, TimeoutError | OSError) or getattr(error, "retriable", False):
            return LogUnavailable(message)
        return LogError(message)

    def _joined(self) -> AIOKafkaConsumer:
        if self._client is None:
            raise LogError("this consumer has no partitions: subscribe or assign first, and not after close")
        return self._client

    async def _started(self) -> AIOKafkaConsumer:
        if self._client is not None:
            return self._client
        policy, size = self._policy, self._settings.max_record_bytes + BATCH_OVERHEAD
        client = AIOKafkaConsumer(
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="none",  # see `_find_place`: what is skipped is named
            isolation_level="read_committed",
            session_timeout_ms=policy.session_ms,
            heartbeat_interval_ms=policy.heartbeat_ms,
            max_poll_interval_ms=policy.max_poll_interval_ms,
            fetch_max_wait_ms=policy.fetch_wait_ms,
            max_partition_fetch_bytes=size,
            fetch_max_bytes=max(policy.fetch_bytes, size),
            # How long unread records of one partition may delay fetches of others from the same broker.
            consumer_timeout_ms=50,
            **aiokafka_config(self._settings),
        )
        limit_aiokafka_logs()
        try:
            async with asyncio.timeout(self._policy.call_s):
                await client.start()
                await self._brokers_known(client)
        except (KafkaError, TimeoutError, OSError) as error:
            await client.stop()
            raise self._error(error, f"connecting to {self._settings.kafka_bootstrap_servers}") from error
        self._client = client
        return client

    async def _brokers_known(self, client: AIOKafkaConsumer) -> None:
        """Waits while the broker names none: it has just started. aiokafka takes such an answer, and then its group
        coordination ends for good with an AssertionError."""
        while not client._client.cluster.brokers():
            await client._client.force_metadata_update()
            await asyncio.sleep(self._policy.retry_s)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka is untyped
    """Passes aiokafka's callbacks on. Both are synchronous: at an await, records could overtake them."""

    def __init__(self, assign: Callable[[Iterable[AioPartition]], None], revoke: Callable[[], None]) -> None:
        self._assign = assign
        self._revoke = revoke

    def on_partitions_assigned(self, assigned: Iterable[AioPartition]) -> None:
        self._assign(assigned)

    def on_partitions_revoked(self, revoked: Iterable[AioPartition]) -> None:
        self._revoke()
