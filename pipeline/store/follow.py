"""The spans of a rollout, live from the log."""

import asyncio
import logging
from collections.abc import AsyncIterator

from millstream.consumers.log.port import Log
from millstream.pipeline.store.results import Store
from millstream.producers.log_lines import rollout_fields
from millstream.schemas.errors import CodecError
from millstream.schemas.ids import written_since_ms
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutEnd, Span
from millstream.schemas.wire.topics import Topics, partition_of

logger = logging.getLogger(__name__)

POLL_RECORDS = 1000
POLL_S = 1.0


async def follow_spans(log: Log, topics: Topics, rollout_id: str, store: Store) -> AsyncIterator[Span]:
    """First those in the store, which retention may have removed from the log; ends with the rollout. A record that
    can't be decoded is skipped with a warning: the sink sends it to the dead letters."""
    partition = Partition(topics.events, partition_of(rollout_id, topics.partitions))
    consumer = log.consumer()
    try:
        await consumer.assign([partition])
        start = await consumer.offsets_since([partition], written_since_ms(rollout_id))
        await consumer.seek(partition, start[partition])
        found = await asyncio.to_thread(store.rollouts, [rollout_id])
        ended = bool(found) and found[0].ended_at is not None
        end = (await consumer.end_offsets([partition]))[partition]  # a known end of the rollout is below it, or gone
        seen: set[tuple[object, ...]] = set()
        for span in await asyncio.to_thread(store.spans, rollout_id):
            seen.add(_identity(span))
            yield span
        while not ended or (consumer.position(partition) or 0) < end:
            for record in await consumer.poll(POLL_RECORDS, POLL_S):
                if record.key != rollout_id:
                    continue
                try:
                    value = codec.decode(record.value)
                except CodecError as error:
                    fields = rollout_fields(rollout_id)
                    logger.warning("%s can't be decoded: %s", record.place, error, extra=fields)
                    continue
                if isinstance(value, RolloutEnd):
                    return
                if isinstance(value, Span) and _identity(value) not in seen:
                    yield value
    finally:
        await consumer.close()


def _identity(span: Span) -> tuple[object, ...]:
    return span.attempt_id, span.source, span.sequence, span.span_id
