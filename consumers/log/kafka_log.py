"""The log on Apache Kafka: its producers and consumers, the creation of its topics, and checks."""

import asyncio
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from millstream.consumers.log.kafka import AioConsumer
from millstream.consumers.log.kafka_offsets import Watermarks
from millstream.consumers.log.kafka_transactional import KafkaTransactionalConsumer
from millstream.consumers.log.poll_times import OpenConsumers, PollTimes, Traffic
from millstream.consumers.log.port import Consumer, TransactionalConsumer
from millstream.producers.log.kafka import KafkaProducer, KafkaTransactionalProducer, ProducerPolicy, Sent
from millstream.producers.log.kafka_config import BATCH_OVERHEAD, FILES, librdkafka_config, raised
from millstream.producers.log.port import LINGER_MS, Producer, TransactionalProducer
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError, LogUnavailable, MillstreamError
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.topics import Topic

logger = logging.getLogger(__name__)

SIZE_LIMIT: Final = "max.message.bytes"
RETENTION: Final = "retention.ms"
DAY_MS: Final = 86_400_000
FRAMING: Final = 1024  # bytes of a batch around a single record


@dataclass(frozen=True, slots=True)
class TopicPolicy:
    """Time-outs of creating and checking topics."""

    check_s: float = 8.0  # for all requests of ``check``, which promises an answer within 10 s
    create_s: float = 30.0


class KafkaLog:
    """`consumers.log.port.Log` on Kafka. One per process; connects on first use."""

    def __init__(self, settings: Settings, policy: TopicPolicy = TopicPolicy()) -> None:
        self._settings = settings
        self._policy = policy
        self._watermarks = Watermarks(settings)
        self._open = OpenConsumers()
        self._sent: list[Sent] = []  # by the producers
        self._limits: dict[str, int] = {}  # bytes of a record by topic, where they are below max_record_bytes

    def producer(self, *, linger_ms: float = LINGER_MS, room_s: float | None = None) -> Producer:
        policy = ProducerPolicy() if room_s is None else ProducerPolicy(buffer_wait_s=room_s)
        producer = KafkaProducer(self._settings, linger_ms=linger_ms, policy=policy, limits=self._limits)
        self._sent.append(producer.sent)
        return producer

    def transactional_producer(self, transactional_id: str) -> TransactionalProducer:
        producer = KafkaTransactionalProducer(self._settings, transactional_id, limits=self._limits)
        self._sent.append(producer.sent)
        return producer

    def consumer(self, group: str | None = None) -> Consumer:
        return AioConsumer(self._settings, self._watermarks, self._open.add(), group)

    def transactional_consumer(self, group: str) -> TransactionalConsumer:
        return KafkaTransactionalConsumer(self._settings, self._watermarks, self._open.add(), group)

    def polls(self) -> list[PollTimes]:
        return self._open.polls()

    def traffic(self) -> Traffic:
        return self._open.traffic(sum(sent.bytes for sent in tuple(self._sent)))

    async def create_topics(self, more: Sequence[Topic] = ()) -> None:
        await self.check_connection()
        created = await asyncio.to_thread(self._create_topics, tuple(more))
        # A topic exists before its partitions have leaders; until then, reads and writes fail.
        await self._watermarks.end(Partition(topic.name, n) for topic in created for n in range(topic.partitions))

    async def check(self) -> None:
        await self.check_connection()
        missing = await asyncio.to_thread(self._missing, self._policy.check_s / 2)
        if missing:
            names = ", ".join(topic.name for topic in missing)
            raise ConfigError(
                f"topics do not exist: {names}; create them with `millstream topics create`, or grant this user the "
                "right to DESCRIBE them"
            )
        await asyncio.to_thread(self._compare_limits)

    def _compare_limits(self) -> None:
        """Notes topics with a limit below ``max_record_bytes``: producers then refuse what the brokers would. Names the
        topics that forget too early."""
        try:
            described = self._described(self._settings.topics.all, self._policy.check_s / 2)
        except KafkaException as error:
            logger.warning(
                "the topics' limits can't be compared with max_record_bytes: %s", raised(error, "reading them")
            )
            return
        for topic, resource, config in described:
            if (limit := int(config[SIZE_LIMIT])) < self._settings.max_record_bytes + FRAMING:
                self._limits[resource.name] = limit - FRAMING
                logger.error(
                    "topic %s takes records of %s bytes, but max_record_bytes is %s: a larger one ends its rollout as "
                    "too_large. Run `millstream topics create` to raise the topic's limit",
                    resource.name,
                    f"{limit:,}",
                    f"{self._settings.max_record_bytes:,}",
                )
            if _forgets(topic, config):
                logger.error(
                    "topic %s keeps records for %.1f days, of the %g that each rollout needs to end exactly once. Run "
                    "`millstream topics create` to lengthen its retention",
                    topic.name,
                    int(config[RETENTION]) / DAY_MS,
                    topic.kept_s * 1000 / DAY_MS,
                )

    async def check_connection(self) -> None:
        """Raises `LogUnavailable` if no broker answers, and `ConfigError` if a setting is wrong."""
        await asyncio.to_thread(self._connect)

    def _connect(self) -> None:
        errors: list[KafkaError] = []
        try:
            client = AdminClient(librdkafka_config(self._settings, on_error=errors.append) | {"log_level": 0})
        except KafkaException as error:
            raise _unusable_file(self._settings, error.args[0].str()) from error
        deadline = time.monotonic() + self._policy.check_s / 2
        wait_s = 0.5  # a wrong setting is known as soon as that; a busy broker gets longer
        while True:
            try:
                client.list_topics(timeout=min(wait_s, max(deadline - time.monotonic(), 0.5)))
                return
            except KafkaException as error:
                client.poll(0)
                wrong = self._wrong_setting(errors)
                if wrong is not None:
                    raise wrong from error
                if time.monotonic() > deadline:
                    raise self._unreachable(errors) from error
                wait_s *= 2

    def _wrong_setting(self, errors: list[KafkaError]) -> MillstreamError | None:
        """The error from the client's callback in terms of the settings. None: it may still connect."""
        settings, where = self._settings, self._settings.kafka_bootstrap_servers
        for error in errors:
            text = error.str()
            if settings.kafka_security_protocol.endswith("SSL") and " alert " in text and "certificate" in text:
                return ConfigError(
                    f"Kafka at {where} refuses this client's certificate (or misses one, or it has expired, or another "
                    "authority has signed it): check kafka_security_cert_file "
                    f"({settings.kafka_security_cert_file or 'not set'}) and kafka_security_key_file "
                    f"({settings.kafka_security_key_file or 'not set'}): {text}"
                )
            if error.code() == KafkaError._AUTHENTICATION:
                return ConfigError(
                    f"Kafka at {where} refuses user {settings.kafka_security_username!r}: check "
                    "kafka_security_username, kafka_security_password and kafka_security_mechanism "
                    f"({settings.kafka_security_mechanism}): {text}"
                )
            if error.code() == KafkaError._SSL:
                return ConfigError(
                    f"no TLS connection to Kafka at {where}: check kafka_security_ca_file "
                    f"({settings.kafka_security_ca_file or 'not set: the system authorities'}) and "
                    f"kafka_security_protocol ({settings.kafka_security_protocol}): {text}"
                )
            if "handshake" in text:  # the broker closes the connection, or does not know the mechanism
                return ConfigError(
                    f"Kafka at {where} rejects kafka_security_protocol {settings.kafka_security_protocol}: {text}"
                )
        return None

    def _unreachable(self, errors: list[KafkaError]) -> LogUnavailable:
        settings, where = self._settings, self._settings.kafka_bootstrap_servers
        why = next((e.str() for e in errors if e.code() != KafkaError._ALL_BROKERS_DOWN), "no answer")
        if any(map(_listens, where.split(","))):
            return LogUnavailable(
                f"something listens at {where} (setting kafka_bootstrap_servers), but does not answer as Kafka with "
                f"kafka_security_protocol {settings.kafka_security_protocol}: does it want TLS or a password? ({why})"
            )
        return LogUnavailable(
            f"no Kafka broker answers at {where} (setting kafka_bootstrap_servers): {why}. "
            "Start one with `millstream kafka up`, or set the address of yours"
        )

    def _missing(self, timeout_s: float, more: Sequence[Topic] = ()) -> list[Topic]:
        """Topics that do not exist. Raises `ConfigError` if a topic has a wrong number of partitions."""
        try:
            found = self._watermarks.client.list_topics(timeout=timeout_s).topics
        except KafkaException as error:
            raise raised(error, "listing the topics") from error
        topics = self._settings.topics
        fixed = {topics.events, topics.triplets, *(topic.name for topic in more)}
        for topic in (*topics.all, *more):
            there = len(found[topic.name].partitions) if topic.name in found else 0
            if there and there != topic.partitions and topic.name in fixed:
                raise ConfigError(
                    f"topic {topic.name} has {there} partitions, kafka_partitions is {topic.partitions}: the partition "
                    f"of a rollout depends on it. Set kafka_partitions={there}, or another topic_prefix"
                )
        return [topic for topic in (*topics.all, *more) if topic.name not in found]

    def _create_topics(self, more: Sequence[Topic]) -> list[Topic]:
        admin, missing = self._watermarks.client, self._missing(self._policy.check_s, more)
        new = [
            NewTopic(t.name, t.partitions, self._settings.kafka_replication_factor, config=self._topic_config(t))
            for t in missing
        ]
        try:
            for created in (admin.create_topics(new) if new else {}).values():
                try:
                    _answer(created, self._policy.create_s)
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another process was faster
                        raise
            self._correct([topic for topic in self._settings.topics.all if topic not in missing])
            self._wait_for_metadata(more)
        except KafkaException as error:
            raise raised(error, "creating the topics") from error
        return missing

    def _correct(self, existing: list[Topic]) -> None:
        """Updates size limits, since ``max_record_bytes`` may have changed, and lengthens a retention that is shorter
        than `LIFETIMES` asks for."""
        wanted, changed = self._settings.max_record_bytes + BATCH_OVERHEAD, []
        for topic, resource, config in self._described(existing, self._policy.check_s):
            change = {SIZE_LIMIT: str(wanted)} if int(config[SIZE_LIMIT]) != wanted else {}
            if _forgets(topic, config):
                change[RETENTION] = _retention_ms(topic)
                logger.warning(
                    "topic %s kept records for %s ms, now %s", topic.name, config[RETENTION], change[RETENTION]
                )
            for name, value in change.items():
                entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
                resource.add_incremental_config(entry)
            if change:
                changed.append(resource)
        for altered in (self._watermarks.client.incremental_alter_configs(changed) if changed else {}).values():
            _answer(altered, self._policy.check_s)

    def _described(
        self, topics: Sequence[Topic], timeout_s: float
    ) -> list[tuple[Topic, ConfigResource, dict[str, str]]]:
        """The configuration of each topic."""
        resources = [ConfigResource(ResourceType.TOPIC, topic.name) for topic in topics]
        described = self._watermarks.client.describe_configs(resources) if resources else {}
        answers = {resource: _answer(found, timeout_s).values() for resource, found in described.items()}
        configs = {r.name: (r, {entry.name: entry.value for entry in entries}) for r, entries in answers.items()}
        return [(topic, *configs[topic.name]) for topic in topics]

    def _topic_config(self, topic: Topic) -> dict[str, Any]:
        config = {
            "cleanup.policy": topic.cleanup,
            SIZE_LIMIT: str(self._settings.max_record_bytes + BATCH_OVERHEAD),
        }
        return config | ({RETENTION: _retention_ms(topic)} if topic.cleanup == "delete" else {})

    def _wait_for_metadata(self, more: Sequence[Topic]) -> None:
        deadline = time.monotonic() + self._policy.create_s
        while self._missing(self._policy.check_s, more):
            if time.monotonic() > deadline:
                raise LogUnavailable(
                    f"new topics are missing after {self._policy.create_s:.0f} s: see the brokers' logs"
                )
            time.sleep(0.05)


def _retention_ms(topic: Topic) -> str:
    return str(int(topic.kept_s * 1000))


def _answer(asked: Future[Any], timeout_s: float) -> Any:
    """Of a request to the brokers. Raises `KafkaException`, also if none comes in time."""
    try:
        return asked.result(timeout_s)
    except TimeoutError:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer within {timeout_s:g} s")) from None


def _forgets(topic: Topic, config: Mapping[str, str]) -> bool:
    """Whether the topic's retention is shorter than `LIFETIMES` asks for; -1 is unlimited."""
    return topic.cleanup == "delete" and 0 <= int(config[RETENTION]) < int(_retention_ms(topic))


def _listens(address: str) -> bool:
    host, _, port = address.strip().rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except (OSError, ValueError):
        return False


def _unusable_file(settings: Settings, text: str) -> ConfigError:
    """For what librdkafka says of a client that it can't create: ``ssl.ca.location failed: …``."""
    for name, option in FILES.items():
        if option in text:
            return ConfigError(
                f"setting {name} ({getattr(settings, name)}) can't be used: it has to name a readable PEM file, "
                f"and a key has to fit its certificate: {text}"
            )
    return ConfigError(f"the kafka_… settings can't be used: {text}")
