"""The consumer port on Kafka where a transactional producer commits the offsets, by librdkafka.

aiokafka passes no group generation to a transaction (a zombie and its successor both committed), and tells no ends of
partitions.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, Message, TopicPartition

from millstream.consumers.kafka import FETCH_BYTES, FETCH_WAIT_MS, SLICE_S, record_key
from millstream.consumers.port import RebalanceListener
from millstream.consumers.watermarks import CALL_TIMEOUT_S, Watermarks
from millstream.producers.kafka_client import BATCH_OVERHEAD, librdkafka_config, log_error, raised
from millstream.schemas.errors import LogError, LogUnavailable, TransactionAborted
from millstream.schemas.log import EndOfPartition, LogRecord, Partition
from millstream.schemas.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TransactionalConsumer:
    """The port by librdkafka, with the group protocol of KIP-848. All calls run in one thread, in order; the
    callbacks run there too, within ``poll``, ``commit`` or ``close``, while the caller awaits it."""

    def __init__(
        self, settings: Settings, watermarks: Watermarks, group: str | None = None, *, eof: bool = False
    ) -> None:
        self._group = group
        self._eof = eof
        self._watermarks = watermarks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="millstream-consumer")
        size = settings.max_record_bytes + BATCH_OVERHEAD
        config = librdkafka_config(
            settings,
            group_id=group or f"{settings.topic_prefix}.none",  # obligatory, and unused by ``assign``
            enable_auto_commit=False,
            enable_auto_offset_store=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            enable_partition_eof=True,
            fetch_wait_max_ms=FETCH_WAIT_MS,
            message_max_bytes=size,
            max_partition_fetch_bytes=size,
            fetch_max_bytes=max(FETCH_BYTES, size),
            receive_message_max_bytes=max(FETCH_BYTES, size) + BATCH_OVERHEAD,
        )
        config["on_commit"] = self._on_commit
        if group is not None:
            config["group.protocol"] = "consumer"
        self._commits: list[tuple[KafkaError | None, list[TopicPartition]]] = []  # answers, not yet looked at
        self._client = Consumer(config)
        self._listener: RebalanceListener | None = None
        self._positions: dict[Partition, int | None] = {}
        self._paused: set[Partition] = set()  # by the role
        self._held: set[Partition] = set()  # by the ``topics`` of the last poll
        self._ready: list[LogRecord | EndOfPartition] = []  # read, not handed out
        self._unjoined: Any = None  # metadata from before the group answered; None once the listener was told anything
        self._cancelled = False
        self._closed = False

    async def subscribe(self, topics: Sequence[str], listener: RebalanceListener | None = None) -> None:
        if self._group is None:
            raise LogError("subscribe needs a group: give one when the consumer is made")
        self._listener = listener
        self._unjoined = self.group_metadata()
        await self._run(
            "subscribing",
            lambda: self._client.subscribe(
                list(topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
            ),
        )

    async def assign(self, partitions: Sequence[Partition], start: Literal["beginning", "end"] = "beginning") -> None:
        first = await (self._watermarks.beginning if start == "beginning" else self._watermarks.stable_end)(partitions)
        self._positions = {**first}
        self._ready.clear()
        await self._run(
            "assigning", lambda: self._client.assign([TopicPartition(*p, offset) for p, offset in first.items()])
        )

    async def poll(
        self, max_records: int, timeout_s: float, topics: Iterable[str] | None = None
    ) -> list[LogRecord | EndOfPartition]:
        wanted = None if topics is None else frozenset(topics)
        self._hold({p for p in self._positions if wanted is not None and p.topic not in wanted})
        found = self._take(max_records, wanted)
        deadline = time.monotonic() + timeout_s
        while not found:
            self._cancelled = False
            try:
                await self._run(f"reading as {self._group}", lambda: self._read(max_records, deadline))
            except asyncio.CancelledError:
                self._cancelled = True  # what is being read now stays in ``_ready`` for the next poll
                raise
            found = self._take(max_records, wanted)
            if time.monotonic() >= deadline:
                break
        return found

    def _take(self, limit: int, wanted: frozenset[str] | None) -> list[LogRecord | EndOfPartition]:
        taken: list[LogRecord | EndOfPartition] = []
        kept: list[LogRecord | EndOfPartition] = []
        for event in self._ready:
            p = event.partition
            fits = len(taken) < limit and p not in self._paused and (wanted is None or p.topic in wanted)
            (taken if fits else kept).append(event)
        self._ready = kept
        for event in taken:
            self._positions[event.partition] = event.offset + isinstance(event, LogRecord)
        return taken if self._eof else [event for event in taken if isinstance(event, LogRecord)]

    def _read(self, limit: int, deadline: float) -> None:
        """One by one: only so is it certain which records came before a callback, and which after."""
        fresh = 0
        while fresh < limit and not self._cancelled:
            if self._read_one(0.0 if fresh else max(0.0, min(SLICE_S, deadline - time.monotonic()))):
                fresh += 1
            elif fresh or time.monotonic() >= deadline:
                return

    def _read_one(self, wait_s: float) -> bool:
        message = self._client.poll(wait_s)
        event = None if message is None else self._event(message)
        if event is not None:
            self._ready.append(event)
        elif self._unjoined is not None and self.group_metadata() != self._unjoined:
            self._tell_assigned([])  # librdkafka keeps silent if the group has no partition for us
        return message is not None

    def _event(self, message: Message) -> LogRecord | EndOfPartition | None:
        error = message.error()
        partition = Partition(message.topic() or "", message.partition() or 0)
        offset = message.offset() or 0
        if error is None:
            headers: Any = message.headers() or []  # names and bytes; the stubs allow what only a producer takes
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
        failed = log_error(error, f"reading {partition}")
        if failed.retriable or error.code() == KafkaError._MAX_POLL_EXCEEDED:
            logger.warning("%s", failed)
            return None
        raise failed

    def _hold(self, hold: set[Partition]) -> None:
        """Pauses what a poll must not hand out, and resumes what the last one held."""
        if hold != self._held:
            self._client.pause([TopicPartition(*p) for p in hold - self._held - self._paused])
            self._client.resume([TopicPartition(*p) for p in self._held - hold - self._paused])
            self._held = hold

    def _on_assign(self, client: Consumer, assigned: list[TopicPartition]) -> None:
        partitions = [Partition(tp.topic, tp.partition) for tp in assigned]
        client.incremental_assign(assigned)
        client.resume(assigned)  # librdkafka keeps a pause across the loss of a partition
        self._positions |= dict.fromkeys(partitions)
        self._tell_assigned(partitions)

    def _tell_assigned(self, partitions: list[Partition]) -> None:
        self._unjoined = None
        if self._listener is not None:
            self._listener.on_assign(partitions)

    def _on_revoke(self, client: Consumer, revoked: list[TopicPartition]) -> None:
        partitions = {Partition(tp.topic, tp.partition) for tp in revoked}
        self._ready = [event for event in self._ready if event.partition not in partitions]
        self._paused -= partitions
        self._held = self._held - partitions
        for partition in partitions:
            self._positions.pop(partition, None)
        if self._listener is not None:
            self._listener.on_revoke(sorted(partitions))
        client.incremental_unassign(revoked)

    def assignment(self) -> frozenset[Partition]:
        return frozenset(self._positions)

    def position(self, partition: Partition) -> int | None:
        return self._positions.get(partition)

    async def seek(self, partition: Partition, offset: int) -> None:
        if partition not in self._positions:
            raise LogError(f"seeking {partition} to {offset}: the partition is not assigned")
        self._ready = [event for event in self._ready if event.partition != partition]
        self._positions[partition] = offset
        await self._run(f"seeking {partition}", lambda: self._client.seek(TopicPartition(*partition, offset)))

    def pause(self, partitions: Iterable[Partition]) -> None:
        new = {p for p in partitions if p in self._positions} - self._paused
        self._client.pause([TopicPartition(*p) for p in new - self._held])
        self._paused |= new

    def resume(self, partitions: Iterable[Partition]) -> None:
        freed = self._paused & set(partitions)
        self._paused -= freed
        self._client.resume([TopicPartition(*p) for p in freed - self._held])

    async def commit(self, offsets: Mapping[Partition, int], timeout_s: float = CALL_TIMEOUT_S) -> None:
        if not offsets:
            return
        lost = [str(p) for p in offsets if p not in self._positions]
        if lost:
            raise TransactionAborted(f"committing as {self._group}: {', '.join(lost)} belong to another member now")
        positions = [TopicPartition(*p, offset) for p, offset in offsets.items()]
        doing = f"committing as {self._group}"
        error, results = await self._run(doing, lambda: self._commit(positions, time.monotonic() + timeout_s))
        for failed in (error, *(result.error for result in results)):
            if failed is not None:
                raise log_error(failed, doing)

    def _commit(
        self, positions: list[TopicPartition], deadline: float
    ) -> tuple[KafkaError | None, list[TopicPartition]]:
        """Not librdkafka's synchronous form: that one has no deadline, and blocks this thread through an outage."""
        self._commits.clear()
        self._client.commit(offsets=positions, asynchronous=True)
        asked = {(tp.topic, tp.partition, tp.offset) for tp in positions}
        while time.monotonic() < deadline:
            self._read_one(min(SLICE_S, max(0.0, deadline - time.monotonic())))  # what comes meanwhile is kept
            for error, results in self._commits:
                if {(tp.topic, tp.partition, tp.offset) for tp in results} == asked:
                    return error, results
        raise LogUnavailable(f"committing as {self._group}: no answer by the deadline")

    def _on_commit(self, error: KafkaError | None, results: list[TopicPartition]) -> None:
        self._commits.append((error, results))

    async def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        asked = [TopicPartition(*p) for p in partitions]
        doing = f"asking for the committed offsets of {self._group}"
        found = await self._run(doing, lambda: self._client.committed(asked, CALL_TIMEOUT_S))
        for tp in found:
            if tp.error:
                raise log_error(tp.error, f"{doing}, {tp.topic}[{tp.partition}]")
        return {Partition(tp.topic, tp.partition): None if tp.offset == OFFSET_INVALID else tp.offset for tp in found}

    async def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return await self._watermarks.end(partitions)

    async def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return await self._watermarks.beginning(partitions)

    def group_metadata(self) -> Any:
        return self._client.consumer_group_metadata()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._cancelled = True
        try:
            await self._run("closing", self._client.close, timeout_s=CALL_TIMEOUT_S)
        except LogUnavailable as error:
            logger.warning("leaving group %s: %s; its session ends by itself", self._group, error)
        self._thread.shutdown(wait=False)

    async def _run(self, doing: str, call: Callable[[], T], timeout_s: float | None = None) -> T:
        """Runs a call of the client in its thread. Raises the port's errors."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except KafkaException as error:
            raise raised(error, doing) from error
        except TimeoutError as error:
            raise LogUnavailable(f"{doing}: no answer within {timeout_s} s") from error
