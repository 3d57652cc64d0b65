"""The spans of a rollout, live from the log."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

from millstream.consumers.log.port import Log
from millstream.schemas.errors import CodecError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutEnd, Span
from millstream.schemas.wire.topics import Topics, partition_of

logger = logging.getLogger(__name__)

POLL_RECORDS = 1000
POLL_S = 1.0


class Stored(Protocol):
    """Where in the log a store has seen a rollout, and its spans."""

    def first_offset(self, rollout_id: str, partition: Partition) -> int:
        """The rollout has no records before this offset."""

    def end_offset(self, rollout_id: str, partition: Partition) -> int | None:
        """The offset of the rollout's end; None if the store has no end."""

    def spans_before(self, rollout_id: str, offset: int) -> list[Span]:
        """The rollout's stored spans with lower offsets, in log order."""


async def follow_spans(log: Log, topics: Topics, rollout_id: str, stored: Stored) -> AsyncIterator[Span]:
    """Ends with the rollout. Spans that retention has removed from the log come from the store. A record that can't be
    decoded is skipped with a warning: the sink sends it to the dead letters."""
    partition = Partition(topics.events, partition_of(rollout_id, topics.partitions))
    consumer = log.consumer()
    try:
        await consumer.assign([partition])
        beginning = (await consumer.beginning_offsets([partition]))[partition]
        start = await asyncio.to_thread(stored.first_offset, rollout_id, partition)
        if start < beginning:
            for span in await asyncio.to_thread(stored.spans_before, rollout_id, beginning):
                yield span
            end = await asyncio.to_thread(stored.end_offset, rollout_id, partition)
            if end is not None and end < beginning:
                return
        high = (await consumer.end_offsets([partition]))[partition]  # a recreated topic has less than the store
        await consumer.seek(partition, min(max(start, beginning), high))
        while True:
            for record in await consumer.poll(POLL_RECORDS, POLL_S):
                if record.key != rollout_id:
                    continue
                try:
                    value = codec.decode(record.value)
                except CodecError as error:
                    logger.warning("%s of rollout %s can't be decoded: %s", record.place, rollout_id, error)
                    continue
                if isinstance(value, Span):
                    yield value
                elif isinstance(value, RolloutEnd):
                    return
    finally:
        await consumer.close()
