"""When the role stores what it has gathered, and what a `Sink` gets."""

import asyncio
import threading
import time

import factories
import pytest
from exposition import checked, text_of
from prometheus_client import CollectorRegistry
from sink_rig import eventually, run_to_the_end

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.port import Unusable
from millstream.consumers.sink.sink import FlushPolicy, PollPolicy, SinkRole
from millstream.schemas.config.settings import load_settings
from millstream.schemas.wire import codec

NEVER = 10**12


class Kept:
    """Keeps batches in memory."""

    def __init__(self):
        self.batches = []
        self.unflushed = []
        self.failing = 0

    def write(self, batch):
        self.unflushed.append(batch)
        return batch.decoded()[1]

    def flush(self):
        if self.failing:
            self.failing -= 1
            raise self.error
        self.batches += self.unflushed
        self.unflushed = []

    def close(self):
        """Nothing to let go of."""

    @property
    def sizes(self):
        return [len(batch.records) for batch in self.batches]


@pytest.fixture
def settings():
    return load_settings(kafka_partitions=1)


@pytest.fixture
def log(settings):
    return MemoryLog(settings.topics, encode=True)


def send_spans(log, settings, number):
    task, producer = factories.task(), log.producer()
    for n in range(number):
        producer.send(settings.topics.events, factories.span(task, "a", sequence=n, span_id="5" * 16), partition=0)
    return len(codec.encode(factories.span(task, "a", span_id="5" * 16)))


@pytest.mark.parametrize("limit", ["rows", "bytes"])
async def test_what_is_full_is_stored_and_what_is_not_waits_until_it_is_old(log, settings, limit):
    size = send_spans(log, settings, 1000)  # as many as one poll gets at most
    policy = {
        "rows": FlushPolicy(rows=1000, bytes=NEVER, age_s=9.0),
        "bytes": FlushPolicy(rows=NEVER, bytes=1000 * size, age_s=9.0),
    }[limit]
    now, kept, stop = [0.0], Kept(), asyncio.Event()
    sink = SinkRole(log, kept, settings, flush=policy, clock=lambda: now[0])
    running = asyncio.create_task(sink.run(stop))
    await eventually(lambda: kept.sizes == [1000])
    send_spans(log, settings, 100)
    await eventually(lambda: sink.waiting == 100)
    now[0] += 8.9
    send_spans(log, settings, 1)
    await eventually(lambda: sink.waiting == 101)
    assert kept.sizes == [1000]
    now[0] += 0.2  # the first of them is old, and takes the others along
    await eventually(lambda: kept.sizes == [1000, 101])
    stop.set()
    await running
    await run_to_the_end(SinkRole(log, kept, settings))
    assert kept.sizes == [1000, 101]


async def test_each_name_gets_all_records(log, settings):
    send_spans(log, settings, 50)
    sinks = {name: Kept() for name in ("", "lake", "audit")}
    await run_to_the_end(*(SinkRole(log, kept, settings, name=name) for name, kept in sinks.items()))
    assert [sum(kept.sizes) for kept in sinks.values()] == [50, 50, 50]


async def test_an_error_that_is_no_store_error_ends_the_sink_and_commits_nothing(log, settings):
    send_spans(log, settings, 50)
    kept = Kept()
    kept.failing, kept.error = 1, ZeroDivisionError("a bug in a sink")
    with pytest.raises(ZeroDivisionError):
        await run_to_the_end(SinkRole(log, kept, settings))
    kept.unflushed = []
    await run_to_the_end(SinkRole(log, kept, settings))
    assert kept.sizes == [50]


async def test_the_lag_in_records_counts_what_is_not_read_and_what_is_not_stored(log, settings):
    stop, blocked = asyncio.Event(), threading.Event()

    class Slow(Kept):
        def write(self, batch):
            blocked.wait(20)
            return super().write(batch)

    flush, poll = FlushPolicy(rows=10, age_s=0.01), PollPolicy(measure_s=0.0)
    sink = SinkRole(log, Slow(), settings, flush=flush, poll=poll)
    send_spans(log, settings, 50)
    running = asyncio.create_task(sink.run(stop))
    await eventually(lambda: sink.waiting == 20)  # one batch is being stored, one is gathered
    await eventually(lambda: sink.lag_records == 50)
    blocked.set()
    await eventually(lambda: sink.lag_records == 0 and sink.stats.records == 50)
    stop.set()
    await running


async def test_inserts_lag_and_dead_letters_are_exported(log, settings):
    """The lag is the age of the oldest record that is not stored, from the log's own timestamps."""
    registry, kept, stop = CollectorRegistry(), Kept(), asyncio.Event()

    class Choosy(Kept):
        def write(self, batch):
            super().write(batch)
            events = [record for record in batch.records if record.partition.topic == settings.topics.events]
            return [Unusable(record, f"because-{record.offset}", "no") for record in events]

    sink = SinkRole(log, kept, settings, registry=registry, flush=FlushPolicy(rows=100, age_s=9.0))
    running = asyncio.create_task(sink.run(stop))
    assert (sink.group, sink.lag_s) == ("millstream.sink", 0)
    began = time.time()
    send_spans(log, settings, 10)
    await eventually(lambda: sink.waiting == 10)
    assert 0 <= sink.lag_s <= time.time() - began + 0.002
    sink._gathered.oldest_ms -= 7000
    assert 6.99 < sink.lag_s <= time.time() - began + 7.002
    send_spans(log, settings, 90)
    await eventually(lambda: kept.sizes == [100])
    await eventually(lambda: sink.waiting == 0)
    assert sink.lag_s == sink.lag_records == 0
    stop.set()
    await running
    samples = checked(text_of(registry))
    assert samples["millstream_sink_insert_seconds_count"] == {(): 1}
    other = CollectorRegistry()
    await run_to_the_end(SinkRole(log, Choosy(), settings, name="choosy", registry=other))
    found = checked(text_of(other))["millstream_dead_letters_total"]
    assert found == {(("reason", "other"), ("role", "sink")): 100}
