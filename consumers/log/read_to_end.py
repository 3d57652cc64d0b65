"""Reads what a log holds now, without a group: for commands that end."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from millstream.consumers.log.port import Log
from millstream.schemas.errors import LogUnavailable
from millstream.schemas.wire.log import LogRecord, Partition

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

POLL_RECORDS = 1000
POLL_S = 0.2
SILENT_S = 10.0  # without a new record before the end; transactions that were left open are over by then


async def read_to_end(
    log: Log,
    partitions: Sequence[Partition],
    start: Mapping[Partition, int] | None = None,
    *,
    since_ms: int = 0,
    progress: Progress | None = None,
) -> AsyncGenerator[LogRecord, None]:
    """Every committed record up to the current ends, each partition in its order, from the offsets in
    ``start``, else from the first timestamp of at least ``since_ms``. ``progress`` counts offsets. Raises
    `LogUnavailable`."""
    consumer = log.consumer()
    try:
        await consumer.assign(partitions)
        first = await consumer.offsets_since(partitions, since_ms) if since_ms else {}
        for partition, offset in (first | dict(start or {})).items():
            await consumer.seek(partition, offset)
        ends = await consumer.end_offsets(partitions)
        begins = await consumer.beginning_offsets(partitions) if progress else {}
        begins = {partition: max(begin, consumer.position(partition) or 0) for partition, begin in begins.items()}
        deadline = time.monotonic() + SILENT_S
        while any((consumer.position(partition) or 0) < end for partition, end in ends.items()):
            for record in await consumer.poll(POLL_RECORDS, POLL_S):
                deadline = time.monotonic() + SILENT_S
                if record.offset < ends[record.partition]:
                    yield record
            if progress is not None:
                at = {p: min(consumer.position(p) or 0, end) for p, end in ends.items()}
                progress(sum(at.values()) - sum(begins.values()), sum(ends.values()) - sum(begins.values()))
            if time.monotonic() > deadline:
                raise LogUnavailable(f"{partitions[0].topic} could not be read to its end; retry")
    finally:
        await consumer.close()
