"""`consumers.log.port.TransactionalConsumer` on Kafka, with librdkafka.

aiokafka passes no group generation to a transaction (a zombie and its successor both committed), and does not report
the ends of partitions.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from millstream.consumers.log.kafka import place_to_continue, record_key
from millstream.consumers.log.kafka_offsets import Watermarks
from millstream.consumers.log.kafka_policy import ConsumerPolicy
from millstream.consumers.log.poll_times import PollTimes
from millstream.consumers.log.port import RebalanceListener
from millstream.producers.log.kafka_config import BATCH_OVERHEAD, librdkafka_config, log_error, missing_right, raised
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import Denied, Fenced, LogError, LogUnavailable
from millstream.schemas.wire.log import EndOfPartition, LogRecord, Partition

logger = logging.getLogger(__name__)

T = TypeVar("T")


class KafkaTransactionalConsumer:
    """Uses the group protocol of KIP-848. All calls run in one thread, in order; callbacks run there, too, within
    ``poll`` or ``close``, while the caller awaits it."""

    def __init__(
        self,
        settings: Settings,
        watermarks: Watermarks,
        polls: PollTimes,
        group: str,
        policy: ConsumerPolicy = ConsumerPolicy(),
    ) -> None:
        self.polls = polls
        self._policy = policy
        self._group = group
        self._settings = settings
        self._right = ""
        self._watermarks = watermarks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="millstream-consumer")
        size = settings.max_record_bytes + BATCH_OVERHEAD
        self._config = librdkafka_config(
            settings,
            group_id=group,
            group_protocol="consumer",
            enable_auto_commit=False,
            enable_auto_offset_store=False,
            auto_offset_reset="error",  # see `_find_place`: what is skipped is named
            isolation_level="read_committed",
            enable_partition_eof=True,
            fetch_wait_max_ms=policy.fetch_wait_ms,
            message_max_bytes=size,
            max_partition_fetch_bytes=size,
            fetch_max_bytes=max(policy.fetch_bytes, size),
            receive_message_max_bytes=max(policy.fetch_bytes, size) + BATCH_OVERHEAD,
        )
        self._client = Consumer(self._config)
        self._topics: list[str] = []
        self._listener: RebalanceListener | None = None
        self._assigned: set[Partition] = set()
        self._ready: list[LogRecord | EndOfPartition] = []  # read, not handed out
        self._stopped: set[Partition] = set()  # by librdkafka: they have no next offset
        self._unjoined: Any = None  # metadata from before the group answered; None after the first callback
        self._denied: Denied | None = None  # why the group can't be joined: librdkafka says it once
        self._renew_at: float | None = None  # when the next client is made
        self._cancelled = False
        self._closed = False

    async def subscribe(self, topics: Sequence[str], listener: RebalanceListener | None = None) -> None:
        self._topics, self._listener = list(topics), listener
        resources = *(("topic", topic) for topic in topics), ("group", self._group)
        self._right = missing_right(self._settings, "Read", *resources)
        await self._run("subscribing", self._join)

    def _join(self) -> None:
        self._unjoined = self.group_metadata()
        self._client.subscribe(
            self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
        )

    async def poll(self, max_records: int, timeout_s: float) -> list[LogRecord | EndOfPartition]:
        with self.polls:
            return await self._poll(max_records, timeout_s)

    async def _poll(self, max_records: int, timeout_s: float) -> list[LogRecord | EndOfPartition]:
        deadline = time.monotonic() + timeout_s
        while not self._ready:
            self._cancelled = False
            try:
                await self._run(f"reading as {self._group}", lambda: self._read(max_records, deadline))
            except asyncio.CancelledError:
                self._cancelled = True  # records being read stay in ``_ready`` for the next poll
                raise
            if time.monotonic() >= deadline:
                if self._denied is not None and not self._ready:
                    raise self._denied
                break
        found, self._ready = self._ready[:max_records], self._ready[max_records:]
        return found

    def _read(self, limit: int, deadline: float) -> None:
        """Reads one by one, so that it is certain which records came before a callback and which after."""
        fresh = 0
        while fresh < limit and not self._cancelled:
            if self._read_one(0.0 if fresh else max(0.0, min(self._policy.slice_s, deadline - time.monotonic()))):
                fresh += 1
            elif fresh or time.monotonic() >= deadline:
                return

    def _read_one(self, wait_s: float) -> bool:
        if self._renew_at is not None and not self._renewed(wait_s):
            return False
        for partition in list(self._stopped):
            self._find_place(partition)
            self._stopped.discard(partition)
        message = self._client.poll(wait_s)
        event = None if message is None else self._event(message)
        if event is not None:
            self._ready.append(event)
        elif self._unjoined is not None and self.group_metadata() != self._unjoined:
            self._notify_assigned([])  # librdkafka does not report an assignment without partitions
        return message is not None

    def _event(self, message: Message) -> LogRecord | EndOfPartition | None:
        error = message.error()
        partition = Partition(message.topic() or "", message.partition() or 0)
        offset = message.offset() or 0
        if error is None:
            self.polls.read_bytes += len(message)
            headers: Any = message.headers() or []  # names and bytes; stubs allow what only producers accept
            return LogRecord(
                partition,
                offset,
                message.timestamp()[1],
                record_key(message.key()),
                message.value() or b"",
                {name: value or b"" for name, value in headers},
            )
        if error.code() == KafkaError._PARTITION_EOF:
            return EndOfPartition(partition, offset)
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            self._stopped.add(partition)  # until the next read: here an error would leave it stopped
            return None
        if error.code() == KafkaError._FATAL:
            raise self._ended(error.str())
        failed = log_error(error, f"reading {partition}", self._right)
        if failed.retriable or error.code() == KafkaError._MAX_POLL_EXCEEDED:
            logger.warning("%s", failed)
            return None
        if self._unjoined is not None and isinstance(failed, Denied):
            self._denied = failed
        raise failed

    def _ended(self, why: str) -> LogError:
        """librdkafka's consumer has ended for good, also if its cause passes, and it says so once. A right that is
        missing is waited for with new clients."""
        message = f"reading as {self._group}: {why}"
        if "authorization failed" not in why:
            return Fenced(f"{message}; start it again")
        self._denied = Denied(f"{message}: {self._right}")
        self._renew_at = time.monotonic() + self._policy.renew_s
        self._revoke(set(self._assigned))
        return self._denied

    def _renewed(self, wait_s: float) -> bool:
        assert self._renew_at is not None
        if (early_s := self._renew_at - time.monotonic()) > 0:
            time.sleep(min(wait_s, early_s))
            return False
        self._renew_at = None
        self._client.close()
        self._client = Consumer(self._config)
        self._join()
        return True

    def _find_place(self, partition: Partition) -> None:
        """Continues where librdkafka found no place."""
        place = TopicPartition(*partition)
        (committed,) = self._client.committed([place], timeout=self._policy.call_s)
        if committed.error is not None:
            raise log_error(committed.error, f"reading the committed offset of {partition}", self._right)
        (current,) = self._client.position([place])
        wanted = max(committed.offset, current.offset)  # negative: none
        first, end = self._client.get_watermark_offsets(place, timeout=self._policy.call_s)
        offset, unread = place_to_continue(partition, wanted, first, end, self._group)
        self.polls.unread += unread
        # A stopped partition can't be sought.
        self._client.incremental_unassign([place])
        self._client.incremental_assign([TopicPartition(*partition, offset)])

    def _on_assign(self, client: Consumer, assigned: list[TopicPartition]) -> None:
        partitions = [Partition(tp.topic, tp.partition) for tp in assigned]
        client.incremental_assign(assigned)
        self._assigned.update(partitions)
        self._notify_assigned(partitions)

    def _notify_assigned(self, partitions: list[Partition]) -> None:
        self._unjoined = self._denied = None
        if self._listener is not None:
            self._listener.on_assign(partitions)

    def _on_revoke(self, client: Consumer, revoked: list[TopicPartition]) -> None:
        self._revoke({Partition(tp.topic, tp.partition) for tp in revoked})
        client.incremental_unassign(revoked)

    def _revoke(self, partitions: set[Partition]) -> None:
        self._ready = [event for event in self._ready if event.partition not in partitions]
        self._assigned -= partitions
        self._stopped -= partitions
        if self._listener is not None:
            self._listener.on_revoke(sorted(partitions))

    async def seek(self, partition: Partition, offset: int) -> None:
        if partition not in self._assigned:
            raise LogError(f"seeking {partition} to {offset}: the partition is not assigned")
        self._ready = [event for event in self._ready if event.partition != partition]
        await self._run(f"seeking {partition}", lambda: self._client.seek(TopicPartition(*partition, offset)))

    async def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return await self._watermarks.end(partitions)

    def group_metadata(self) -> Any:
        return self._client.consumer_group_metadata()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = self.polls.closed = True
        self._cancelled = True
        try:
            await self._run("closing", self._client.close, timeout_s=self._policy.call_s)
        except LogUnavailable as error:
            logger.warning("leaving group %s: %s; its session will expire", self._group, error)
        self._thread.shutdown(wait=False)

    async def _run(self, doing: str, call: Callable[[], T], timeout_s: float | None = None) -> T:
        """Runs a call of the client in the thread. Raises the port's errors."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except KafkaException as error:
            raise raised(error, doing, self._right) from error
        except TimeoutError as error:
            raise LogUnavailable(f"{doing}: no answer within {timeout_s} s") from error
