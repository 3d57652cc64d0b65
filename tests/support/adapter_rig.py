"""An adapter over a log, and what it reads and writes."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass

from factories import call, event, reward

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.port import Log
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.topics import Topics


@dataclass
class Bed:
    """A log and its topics."""

    log: Log
    topics: Topics


@asynccontextmanager
async def adapter_on(bed, name="0", **options):
    adapter = Adapter(bed.log, bed.topics, transactional_id=f"{bed.topics.prefix}-{name}", **options)
    stop = asyncio.Event()
    running = asyncio.create_task(adapter.run(stop))
    await asyncio.wait([running, asyncio.create_task(adapter.wait_ready())], return_when=asyncio.FIRST_COMPLETED)
    try:
        yield adapter
    finally:
        stop.set()
        await running


async def write(bed, *values):
    producer = bed.log.producer()
    for value in values:
        key = value.rollout_id if not isinstance(value, bytes) else "garbage"
        await send_acknowledged(producer, bed.topics.events, value, key=key)
    producer.close()


class Reader:
    """Everything committed on a topic, as it comes."""

    def __init__(self, bed, topic, partitions=4):
        self.consumer = bed.log.consumer()
        self.partitions = [Partition(topic, n) for n in range(partitions)]
        self.found = []

    async def until(self, condition, seconds=30):
        if not self.consumer.assignment():
            await self.consumer.assign(self.partitions, "beginning")
        async with asyncio.timeout(seconds):
            while not condition(self.found):
                for record in await self.consumer.poll(100, 1.0):
                    assert isinstance(record, LogRecord)
                    self.found.append((record, codec.decode(record.value)))
        return [value for _, value in self.found]

    async def rest(self):
        """Everything, including the unexpected."""
        while records := await self.consumer.poll(100, 0.5):
            self.found += [(record, codec.decode(record.value)) for record in records]
        return self.found


def counted(registry, name, *labels):
    """A counter's values by its labels, zeros left out."""
    samples = [s for m in registry.collect() for s in m.samples if s.name == f"millstream_{name}_total"]
    keys = [tuple(sample.labels[label] for label in labels) for sample in samples]
    return {key[0] if len(key) == 1 else key: s.value for key, s in zip(keys, samples, strict=True) if s.value}


def history(of, attempt="a", value=0.5):
    return (
        event(of, attempt, "preparing"),
        call(of, attempt, "1"),
        reward(of, attempt, value),
        event(of, attempt, "succeeded", span_counts={"agent": 1, "proxy": 1}),
    )
