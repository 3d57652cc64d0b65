"""A FastStream broker for users' own processors: it reads and writes Millstream's records, and skips none.

broker = ms.broker(ms.load_settings())

@broker.subscriber("millstream.events", group_id="failures")
async def count(record): ...
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from aiokafka.structs import ConsumerRecord
from faststream import AckPolicy, BaseMiddleware
from faststream.exceptions import IgnoredException
from faststream.kafka import KafkaBroker
from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512

from millstream.consumers.dead_letters import dead_letter, letter_key
from millstream.consumers.log.kafka import record_key
from millstream.producers.log.kafka_config import BATCH_OVERHEAD, aiokafka_config
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import CodecError, WrongType
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import KIND_HEADER, LogRecord, Partition

logger = logging.getLogger(__name__)

TRIES: Final = 5
BACKOFF_S: Final = 0.1  # after the first try; doubles with each
SASL: Final = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}


class Undecodable(CodecError):
    """A body that is not a Millstream record."""


class Codec:
    """Bodies in Avro single-object encoding. What can't be decoded in a batch becomes a dead letter; the rest of the
    batch is handed over."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def decode(self, msg: Any) -> Any:
        try:
            return codec.decode(msg.body)
        except CodecError as error:
            raise Undecodable(str(error)) from error

    async def decode_batch(self, msg: Any) -> list[Any]:
        records = []
        for raw in msg.raw_message:
            try:
                records.append(codec.decode(raw.value or b""))
            except CodecError as error:
                await self._broker.refuse(raw, "undecodable", error)
        return records

    async def encode(self, msg: Any, serializer: Any = None) -> tuple[bytes, None]:
        if isinstance(msg, bytes):
            return msg, None
        if type(msg) not in codec.CODECS:
            raise WrongType(f"{type(msg).__name__} can't be published: publish bytes or a record of millstream.schemas")
        return codec.encode(msg), None

    async def encode_batch(self, msgs: Sequence[Any], serializer: Any = None) -> list[tuple[bytes, None]]:
        return [await self.encode(msg) for msg in msgs]


class Broker(KafkaBroker):
    """FastStream's Kafka broker. A subscriber with a ``group_id`` starts at the oldest record, reads committed records
    and handles each at least once. If its handler raises, the record is read again, up to ``tries`` times in all, and
    then becomes a dead letter with the handler's name as its role. A subscriber without a group only watches: it starts
    at the next record, commits nothing, and logs what it can't use.

    A group also starts at the oldest record where its committed offset has been deleted by retention, and where
    aiokafka finds none although there is one, as may happen while a restarted broker loads its offsets (our own
    consumers ask librdkafka: see `Watermarks.committed`). So no record that the log still holds is skipped, but up to
    seven days of them may be handled once more: handlers have to be idempotent, as at-least-once delivery asks anyway.
    Records that retention has deleted before the group read them are not named."""

    def __init__(self, settings: Settings, tries: int = TRIES) -> None:
        self._settings = settings
        self._tries = tries
        self._failed: dict[tuple[str | None, str, int], tuple[int, int]] = {}  # partition → offset, tries
        super().__init__(
            settings.kafka_bootstrap_servers.split(","),
            security=_security(settings),
            codec=Codec(self),
            parser=_parse,
            middlewares=(partial(_Guard, self),),
            allow_auto_create_topics=False,  # it would create them with one partition
            acks="all",
            enable_idempotence=True,
            compression_type=None if settings.compression == "none" else settings.compression,
            max_request_size=settings.max_record_bytes + BATCH_OVERHEAD,
            logger=logger,
        )

    def subscriber(self, *topics: Any, **options: Any) -> Any:
        """As FastStream's, with other defaults."""
        defaults = {
            "auto_offset_reset": "earliest" if options.get("group_id") else "latest",
            "ack_policy": AckPolicy.NACK_ON_ERROR if options.get("group_id") else AckPolicy.MANUAL,
            "isolation_level": "read_committed",
            "max_partition_fetch_bytes": self._settings.max_record_bytes + BATCH_OVERHEAD,
        }
        return super().subscriber(*topics, **defaults | options)

    async def failed(self, raw: Any, error: Exception) -> bool:
        """Returns whether the record, or batch of them, is done with; else it is read again."""
        records: tuple[ConsumerRecord, ...] = raw if isinstance(raw, tuple) else (raw,)
        first, group = records[0], self.context.get_local("handler_").group_id
        position = group, first.topic, first.partition
        offset, tries = self._failed.get(position, (-1, 0))
        tries = tries + 1 if offset == first.offset else 1
        self._failed[position] = first.offset, tries
        undecodable = isinstance(error, Undecodable)
        if group is not None and tries < self._tries and not undecodable:
            await asyncio.sleep(BACKOFF_S * 2 ** (tries - 1))
            return False
        for record in records:
            await self.refuse(record, "undecodable" if undecodable else "handler", error)
        return True

    async def refuse(self, raw: ConsumerRecord, reason: str, error: Exception) -> None:
        """Logs a record as unusable; makes a dead letter of it if the subscriber is in a group."""
        subscriber = self.context.get_local("handler_")
        name = subscriber.calls[0].name
        headers = {key: value or b"" for key, value in raw.headers}
        partition, key = Partition(raw.topic, raw.partition), record_key(raw.key)
        record = LogRecord(partition, raw.offset, raw.timestamp, key, raw.value or b"", headers)
        logger.error("%s can't use %s: %s: %s", name, record.place, type(error).__name__, error)
        if subscriber.group_id is not None:
            letter = dead_letter(record, name, reason, f"{type(error).__name__}: {error}")
            raw_key = (letter_key(letter) or "").encode() or None
            await self.publish(letter, self._settings.topics.dead, key=raw_key, headers={KIND_HEADER: reason})


async def _parse(msg: Any, original: Callable[[Any], Awaitable[Any]]) -> Any:
    """FastStream's parser requires headers in UTF-8, and skips a record that it can't parse."""
    parsed = await original(tuple(map(_readable, msg)) if isinstance(msg, tuple) else _readable(msg))
    parsed.raw_message = msg
    return parsed


def _readable(raw: ConsumerRecord) -> ConsumerRecord:
    return replace(raw, headers=[(key, (value or b"").decode(errors="replace").encode()) for key, value in raw.headers])


class _Guard(BaseMiddleware):
    """Surrounds the parsing, the handler and the publishing of one record. Returning True counts as success."""

    def __init__(self, broker: Broker, msg: Any, /, *, context: Any) -> None:
        super().__init__(msg, context=context)
        self._broker = broker

    async def after_processed(self, exc_type: Any = None, exc_val: Any = None, exc_tb: Any = None) -> bool:
        if not isinstance(exc_val, Exception) or isinstance(exc_val, IgnoredException):
            return False  # FastStream's own signals, such as NackMessage
        return await self._broker.failed(self.msg, exc_val)


def _security(settings: Settings) -> BaseSecurity:
    config = aiokafka_config(settings)
    context = config.get("ssl_context")
    if "sasl_mechanism" not in config:
        return BaseSecurity(context)
    user, password = config["sasl_plain_username"], config["sasl_plain_password"]
    return SASL[config["sasl_mechanism"]](user, password, context)


def broker(settings: Settings, tries: int = TRIES) -> Broker:
    """A FastStream broker with the connection, security and limits of the settings. Handlers get decoded records, and
    ``publish`` takes records. `Broker` says what happens to a record whose handler raises."""
    return Broker(settings, tries)
