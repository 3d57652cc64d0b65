"""Beginnings and ends of Kafka's partitions, and offsets that groups have committed."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from millstream.consumers.log.kafka_policy import ConsumerPolicy
from millstream.producers.log.kafka_config import librdkafka_config, log_error, raised
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
        """
        asked = [TopicPartition(*p) for p in partitions]
        if not asked:
            return {}
        doing = f"reading the committed offsets of {group}"
        request = [ConsumerGroupTopicPartitions(group, asked)]
        answers = await self._answers(
            lambda: self.client.list_consumer_group_offsets(request, request_timeout=self._policy.call_s), asked, doing
        )
        found = next(iter(answers.values())).topic_partitions
        for tp in found:
            if tp.error is not None:
                raise log_error(tp.error, doing)
        return {Partition(tp.topic, tp.partition): None if tp.offset < 0 else tp.offset for tp in found}

    async def _ask(
        self,
        partitions: Iterable[Partition],
        spec: OffsetSpec,
        isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
    ) -> dict[Partition, int]:
        asked = [TopicPartition(*p) for p in partitions]
        if not asked:
            return {}
        names = [f"{tp.topic}[{tp.partition}]" for tp in asked]
        answers = await self._answers(
            lambda: self.client.list_offsets(
                dict.fromkeys(asked, spec), isolation_level=isolation, request_timeout=self._policy.call_s
            ),
            asked,
            f"reading the offsets of {', '.join(names[:3])}{'…' if names[3:] else ''}",
        )
        return {Partition(tp.topic, tp.partition): answer.offset for tp, answer in answers.items()}

    async def _answers(
        self, request: Callable[[], Mapping[Any, Future[Any]]], asked: list[TopicPartition], doing: str
    ) -> dict[Any, Any]:
        """Repeats the request while its errors are those of a moving leader or coordinator."""
        deadline = time.monotonic() + self._policy.call_s
        while True:
            futures = request()
            try:
                answers = await asyncio.gather(*map(asyncio.wrap_future, futures.values()))
                return dict(zip(futures, answers, strict=True))
            except KafkaException as failed:
                error = raised(failed, doing)
                if not error.retriable or time.monotonic() > deadline:
                    raise error from failed
            # A leader has moved, or that of a new topic is starting. The client would use the leader and epoch that it
            # remembers for minutes: only an explicit request for metadata replaces them.
            await asyncio.sleep(self._policy.retry_s)
            for topic in {tp.topic for tp in asked}:
                with suppress(KafkaException):
                    await asyncio.to_thread(self.client.list_topics, topic, timeout=1.0)
