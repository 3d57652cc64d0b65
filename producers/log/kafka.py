"""The producer port on Kafka, with confluent-kafka: any thread may send, and a hand-over takes microseconds."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial as bind
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka import Producer as Client

from millstream.producers.log.kafka_config import BATCH_OVERHEAD, librdkafka_config, log_error, missing_right, raised
from millstream.producers.log.port import LINGER_MS, OnAck
from millstream.producers.supervisor import supervisor
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import BufferFull, LogError, LogUnavailable, TooLarge, TransactionAborted
from millstream.schemas.wire.codec import encode
from millstream.schemas.wire.log import Headers, Partition
from millstream.schemas.wire.records import Record
from millstream.schemas.wire.topics import LIBRDKAFKA_PARTITIONER

logger = logging.getLogger(__name__)

BATCH_BYTES = 1_000_000  # librdkafka's own


@dataclass(frozen=True, slots=True)
class ProducerPolicy:
    buffer_wait_s: float = 60.0  # how long a sender waits for room, as the port promises
    buffer_records: int = 100_000
    buffer_kb: int = 128 << 10
    delivery_ms: int = 180_000  # a record outlives an outage of two minutes
    poll_s: float = 0.1  # how long a close waits for the thread that serves acknowledgements
    transaction_ms: int = 10_000  # a frozen process delays the readers of its open transaction by this much


@dataclass(slots=True)
class Sent:
    """What a producer was given to send. Outlives it."""

    bytes: int = 0  # of values


class KafkaProducer:
    """An idempotent producer, acknowledged by all replicas."""

    def __init__(
        self,
        settings: Settings,
        *,
        linger_ms: float = LINGER_MS,
        policy: ProducerPolicy = ProducerPolicy(),
        options: Mapping[str, Any] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        """Connects in the background: without a broker, records are not acknowledged. ``options`` of librdkafka
        override those set here. ``limits``: bytes of a record by topic, where they are below max_record_bytes."""
        self._policy = policy
        self._settings = settings
        self._limits = {} if limits is None else limits
        self._limit = settings.max_record_bytes
        # Records without key and partition go round: librdkafka itself would keep a burst on one partition.
        self._next = {t.name: itertools.count(time.monotonic_ns()) for t in settings.topics.all}
        self._partitions = {t.name: t.partitions for t in settings.topics.all}
        self._client = Client(
            librdkafka_config(
                settings,
                acks="all",
                enable_idempotence=True,
                partitioner=LIBRDKAFKA_PARTITIONER,
                compression_type=settings.compression,
                linger_ms=linger_ms,
                delivery_timeout_ms=policy.delivery_ms,
                message_max_bytes=self._limit + BATCH_OVERHEAD,
                batch_size=min([BATCH_BYTES, *self._limits.values()]),  # brokers refuse a batch as a whole
                queue_buffering_max_messages=policy.buffer_records,
                queue_buffering_max_kbytes=max(policy.buffer_kb, 2 * self._limit >> 10),
            )
            | dict(options or {})
        )
        self.sent = Sent()
        self._unsettled = 0
        self._settled = threading.Condition()
        self._closed = threading.Event()
        # A daemon: acknowledgements must not keep a process alive after its main thread has ended.
        self._thread = supervisor().thread("millstream-producer", self._serve)

    def send(
        self,
        topic: str,
        value: Record | bytes,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers | None = None,
        on_ack: OnAck | None = None,
    ) -> None:
        if self._closed.is_set():
            raise LogError(f"sending to {topic}: this producer is closed")
        body = value if isinstance(value, bytes) else encode(value)
        raw_key = None if key is None else key.encode("utf-8", "surrogateescape")
        size = len(body) + len(raw_key or b"") + sum(len(k) + len(v) for k, v in (headers or {}).items())
        if size > (limit := self._limits.get(topic, self._limit)):
            raise TooLarge(
                f"{topic}, key {key}: the record has {size:,} bytes, of at most {limit:,} (max_record_bytes)"
            )
        if partition is None:
            rounds = self._next.get(topic) if key is None else None
            partition = -1 if rounds is None else next(rounds) % self._partitions[topic]
        with self._settled:
            self._unsettled += 1
            self.sent.bytes += len(body)
        try:
            self._produce(topic, body, raw_key, partition, headers, bind(self._delivered, topic, on_ack))
        except BaseException:
            self._settle()
            raise

    def _produce(
        self,
        topic: str,
        body: bytes,
        key: bytes | None,
        partition: int,
        headers: Headers | None,
        on_delivery: Callable[[KafkaError | None, Message], None],
    ) -> None:
        deadline = time.monotonic() + self._policy.buffer_wait_s
        fields: list[tuple[str, str | bytes | None]] = list((headers or {}).items())
        while True:
            try:
                self._client.produce(topic, body, key, partition, headers=fields, on_delivery=on_delivery)
                return
            except BufferError:
                if time.monotonic() >= deadline:
                    raise BufferFull(
                        f"{topic}: the buffer ({self._policy.buffer_records:,} records) has been full for "
                        f"{self._policy.buffer_wait_s:.0f} s; "
                        "are the brokers reachable (kafka_bootstrap_servers)?"
                    ) from None
                self._client.poll(0.01)
            except KafkaException as error:
                raise self._refused(error, f"sending to {topic}", ("topic", topic)) from error

    def _refused(self, error: KafkaException, doing: str, resource: tuple[str, str]) -> LogError:
        return raised(error, doing, missing_right(self._settings, "Write", resource))

    def _delivered(self, topic: str, on_ack: OnAck | None, error: KafkaError | None, message: Message) -> None:
        try:
            failed = None
            if error is not None:
                right = missing_right(self._settings, "Write", ("topic", topic))
                failed = log_error(error, f"sending to {topic}", right)
            if on_ack is not None:
                on_ack(failed, -1 if failed else message.offset() or 0)
            elif failed is not None:
                logger.error("a record was not stored: %s", failed)
        except Exception:
            logger.exception("on_ack of a record of %s raised", topic)
        finally:
            self._settle()

    def _settle(self) -> None:
        with self._settled:
            self._unsettled -= 1
            if not self._unsettled:
                self._settled.notify_all()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                self._client.poll(self._policy.poll_s)
            except Exception:  # from a callback; later acknowledgements still have to be served
                logger.exception("serving acknowledgements")

    def flush(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self._client.flush(timeout_s)
        # The other thread may still run the last callbacks: wait until they have returned.
        with self._settled:
            if not self._settled.wait_for(lambda: not self._unsettled, max(0.0, deadline - time.monotonic())):
                raise LogUnavailable(
                    f"{self._unsettled} records are not acknowledged after {timeout_s:g} s; "
                    "are the brokers reachable (kafka_bootstrap_servers)?"
                )

    def close(self, timeout_s: float = 10.0) -> None:
        if self._closed.is_set():
            return
        try:
            self.flush(timeout_s)
        except LogUnavailable:
            self._client.purge()
            self._client.flush(1)  # reports the failure to those that wait for acknowledgements
            raise
        finally:
            # The client lives as long as this object: closing it here could break a thread that is sending.
            self._closed.set()
            self._thread.join()


class KafkaTransactionalProducer(KafkaProducer):
    """One transaction at a time, by one thread. ``transactional_id`` is stable per replica."""

    def __init__(
        self,
        settings: Settings,
        transactional_id: str,
        policy: ProducerPolicy = ProducerPolicy(),
        limits: Mapping[str, int] | None = None,
    ) -> None:
        options = {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": policy.transaction_ms,
            "delivery.timeout.ms": policy.transaction_ms,
            "retry.backoff.ms": 10,  # librdkafka otherwise pauses 100 ms between two transactions
        }
        super().__init__(settings, linger_ms=0.0, policy=policy, options=options, limits=limits)
        self._id = transactional_id
        self._open = False

    def _refused(self, error: KafkaException, doing: str, resource: tuple[str, str]) -> LogError:
        failed = super()._refused(error, doing, resource)
        if self._open and error.args[0].code() == KafkaError._STATE:  # an earlier error requires an abort
            return TransactionAborted(str(failed))
        return failed

    def init_transactions(self, timeout_s: float) -> None:
        self._call("starting transactions", self._client.init_transactions, timeout_s)

    def begin_transaction(self) -> None:
        self._call("beginning a transaction", self._client.begin_transaction)
        self._open = True

    def send_offsets(self, offsets: Mapping[Partition, int], group: Any, timeout_s: float) -> None:
        positions = [TopicPartition(p.topic, p.number, offset) for p, offset in offsets.items()]
        self._call("adding offsets", self._client.send_offsets_to_transaction, positions, group, timeout_s)

    def commit_transaction(self, timeout_s: float) -> None:
        self._call("committing", self._client.commit_transaction, timeout_s)
        self._open = False

    def abort_transaction(self, timeout_s: float) -> None:
        self._call("aborting", self._client.abort_transaction, timeout_s)
        self._open = False

    def close(self, timeout_s: float = 10.0) -> None:
        if self._open and not self._closed.is_set():
            try:
                self.abort_transaction(timeout_s)
            except LogError as error:  # the broker will abort it, or a newer process has
                logger.warning("%s", error)
        super().close(timeout_s)

    def _call(self, doing: str, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except KafkaException as error:
            raise self._refused(error, f"{doing} ({self._id})", ("transactional-id", self._id)) from error
