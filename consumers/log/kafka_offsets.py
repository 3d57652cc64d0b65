"""Beginnings and ends of Kafka's partitions, and offsets that groups have committed."""

import asyncio
import time
from collections.abc import Iterable
from contextlib import closing, suppress

from confluent_kafka import Consumer, IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from millstream.consumers.log.kafka_policy import ConsumerPolicy
from millstream.producers.log.kafka_config import librdkafka_config, log_error, missing_right, raised
from millstream.schemas.config.settings import Settings
from millstream.schemas.wire.log import Partition


class Watermarks:
    """Beginnings and ends of partitions, including records of open transactions, and what groups have committed. Raises
    `LogError`."""

    def __init__(self, settings: Settings, policy: ConsumerPolicy = ConsumerPolicy()) -> None:
        self._settings = settings
        self._policy = policy
        self._client: AdminClient | None = None

    @property
    def client(self) -> AdminClient:
        if self._client is None:
            self._client = AdminClient(librdkafka_config(self._settings))
        return self._client

    async def beginning(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return await self._ask(partitions, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    async def end(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return await self._ask(partitions, OffsetSpec.latest())  # type: ignore[no-untyped-call]

    async def stable_end(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The beginning of the oldest open transaction, or the end."""
        return await self._ask(
            partitions,
            OffsetSpec.latest(),  # type: ignore[no-untyped-call]
            IsolationLevel.READ_COMMITTED,
        )

    async def since(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """The first offset with a timestamp of at least ``time_ms``, or the end."""
        asked = list(partitions)
        found = await self._ask(asked, OffsetSpec.for_timestamp(time_ms))
        return found | await self.end(p for p in asked if found[p] < 0)

    async def committed(self, group: str, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        """None where the group has committed nothing.

        aiokafka must not be asked: it overlooks errors of the whole group (those of a coordinator that is loading or
        has moved, as after a broker's restart, or of a denied group) and reports that nothing has been committed.
        Neither must librdkafka's admin client (2.16): an outage at that moment can abort the process.
        """
        asked = [TopicPartition(*p) for p in partitions]
        return await asyncio.to_thread(self._committed, group, asked) if asked else {}

    def _committed(self, group: str, asked: list[TopicPartition]) -> dict[Partition, int | None]:
        doing = f"reading the committed offsets of {group}"
        right = missing_right(self._settings, "Read", ("group", group))
        with closing(Consumer(librdkafka_config(self._settings, group_id=group))) as client:  # does not join the group
            try:
                found = client.committed(asked, timeout=self._policy.call_s)
            except KafkaException as error:
                raise raised(error, doing, right) from error
        for tp in found:
            if tp.error is not None:
                raise log_error(tp.error, doing, right)
        return {Partition(tp.topic, tp.partition): None if tp.offset < 0 else tp.offset for tp in found}

    async def _ask(
        self,
        partitions: Iterable[Partition],
        spec: OffsetSpec,
        isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
    ) -> dict[Partition, int]:
        asked = list(partitions)
        if not asked:
            return {}
        doing = f"reading the offsets of {', '.join(map(str, asked[:3]))}{'…' if asked[3:] else ''}"
        deadline = time.monotonic() + self._policy.call_s
        while True:
            futures = self.client.list_offsets(
                {TopicPartition(*p): spec for p in asked},
                isolation_level=isolation,
                request_timeout=self._policy.call_s,
            )
            try:
                answers = await asyncio.gather(*map(asyncio.wrap_future, futures.values()))
                return {Partition(tp.topic, tp.partition): a.offset for tp, a in zip(futures, answers, strict=True)}
            except KafkaException as failed:
                topics = [("topic", topic) for topic in sorted({p.topic for p in asked})]
                error = raised(failed, doing, missing_right(self._settings, "Read", *topics))
                if not error.retriable or time.monotonic() > deadline:
                    raise error from failed
            # A leader has moved, or that of a new topic is starting. The client would use the leader and epoch that it
            # remembers for minutes: only an explicit request for metadata replaces them.
            await asyncio.sleep(self._policy.retry_s)
            for topic in {p.topic for p in asked}:
                with suppress(KafkaException):
                    await asyncio.to_thread(self.client.list_topics, topic, timeout=1.0)
