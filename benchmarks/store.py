"""Spans from Kafka's bytes into the store, how fresh they are there, and what questions cost.

CPU is all of this process: Kafka's client, the sink and the embedded engine with all tables and views. The floor is
taken in the same run: each body decoded by fastavro, and one column-oriented insert of the rows into one plain table.

    python benchmarks/store.py [--quick] [--rows N] [--json FILE]      from the repository's root
"""

import argparse
import asyncio
import json
import statistics
import struct
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
from rich.console import Console
from rich.table import Table

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.sink.clickhouse import ClickHouseSink
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.encoded_spans import TABLE
from millstream.consumers.sink.sink import FlushPolicy, SinkRole
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.producers.log.port import Producer
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import Span

SPANS_PER_ROLLOUT = 20
BATCH = 10_000
FRESH_RATE, FRESH_S = 1000, 20  # spans per second, seconds
NAMES = ("chat", "add", "multiply", "agent", "reward")
KINDS = ("llm", "tool", "tool", "agent", "reward")
TEXT = "What is the sum of these two numbers, and then the product with the third one? Use the tools that you have. "


def spans(count: int) -> Iterator[Span]:
    """Of rollouts with 20 spans each; a fifth are model calls with token ids. Bodies of 690 bytes on average."""
    resource = {"service.name": "benchmark", "host.name": "somewhere"}
    ids = struct.pack("<50i", *range(50))
    for number in range(count):
        at = number % SPANS_PER_ROLLOUT
        if at == 0:
            rollout_id, attempt_id, trace_id = new_id(), new_id(), uuid.uuid4().hex
        llm = KINDS[at % 5] == "llm"
        now = time.time_ns()
        yield Span(
            trace_id=trace_id,
            span_id=uuid.uuid4().hex[:16],
            name=NAMES[at % 5],
            kind=KINDS[at % 5],
            start=now,
            end=now + 1_000_000,
            status="Ok",
            attributes={"gen_ai.request.model": "policy", "gen_ai.input.messages": f"{number} {TEXT * 3}"},
            resource=resource,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            source="proxy" if llm else "agent",
            sequence=at,
            prompt_token_ids=ids if llm else None,
            response_token_ids=ids[:40] if llm else None,
            response_logprobs=ids[:40] if llm else None,
            reward=1.0 if KINDS[at % 5] == "reward" else None,
            model_version=f"run.0.{number // 1000}",
        )


def publish(producer: Producer, topic: str, count: int) -> float:
    """Mean size of a body in bytes."""
    size = 0
    for span in spans(count):
        body = codec.encode(span)
        size += len(body)
        producer.send(topic, body, key=span.rollout_id, headers={"kind": span.kind.encode()})
    producer.flush(120)
    return size / count


async def through_the_sink(log: KafkaLog, settings: Settings, writer: ClickHouseWriter, count: int) -> float:
    """CPU seconds from the first poll to the last commit."""
    role = SinkRole(log, ClickHouseSink(writer, settings.topics.events), settings, flush=FlushPolicy(BATCH))
    stop = asyncio.Event()
    began = time.process_time()
    running = asyncio.create_task(role.run(stop))
    while role.stats.records < count:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    used = time.process_time() - began
    stop.set()
    await running
    return used


def floor(writer: ClickHouseWriter, bodies: list[bytes]) -> float:
    """CPU seconds to decode every body and to insert the spans' columns once, into a table without views."""
    schema = fastavro.parse_schema(codec.load_schema("Span"))
    names = codec.CODECS[Span].field_names
    writer.client.command(f"CREATE TABLE floor AS {TABLE} ENGINE = MergeTree ORDER BY (rollout_id, sequence)")
    places = ("log_topic", "log_partition", "log_offset", "log_end")
    began = time.process_time()
    for first in range(0, len(bodies), BATCH):
        rows = [
            fastavro.schemaless_reader(BytesIO(body[codec.HEADER_SIZE :]), schema, None)
            for body in bodies[first : first + BATCH]
        ]
        columns: list[Any] = [[row[name] for row in rows] for name in names]
        numbers = range(first, first + len(rows))
        columns += [["events"] * len(rows), [0] * len(rows), numbers, numbers]
        writer.client.insert("floor", columns, column_names=[*names, *places], column_oriented=True)
    return time.process_time() - began


async def freshness(log: KafkaLog, settings: Settings, writer: ClickHouseWriter, store: ClickHouseStore) -> list[float]:
    """Seconds from a span's sending until a query sees it, at `FRESH_RATE` spans per second."""
    role = SinkRole(log, ClickHouseSink(writer, settings.topics.events), settings)
    stop, producer = asyncio.Event(), log.producer()
    running = asyncio.create_task(role.run(stop))
    question = "SELECT countIf(SpanName LIKE 'fresh-%') FROM spans_raw"
    sent: list[float] = []
    seen: list[float] = []

    async def send() -> None:
        began = time.monotonic()
        for number, span in enumerate(spans(FRESH_RATE * FRESH_S)):
            if (wait := began + number / FRESH_RATE - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            sent.append(time.monotonic())
            fresh = replace(span, name=f"fresh-{number}")
            producer.send(settings.topics.events, fresh, key=span.rollout_id, headers={"kind": b"llm"})

    sending = asyncio.create_task(send())
    while len(seen) < FRESH_RATE * FRESH_S:
        await asyncio.sleep(0.05)
        ((there,),) = (await asyncio.to_thread(store.sql, question)).rows
        # They arrive in batches: the n that are there are the first n sent, to within a batch.
        seen += [time.monotonic()] * (there - len(seen))
    await sending
    stop.set()
    await running
    producer.close()
    return [at - was for at, was in zip(seen, sent, strict=True)]


def fill(writer: ClickHouseWriter, rows: int) -> None:
    """Stores rows as a thousand rollouts at a time would leave them: a rollout's spans lie scattered over 20 blocks."""
    for first in range(0, rows, 1_000_000):
        writer.client.command(FILL.format(first=first, count=min(1_000_000, rows - first)))


FILL = """
INSERT INTO spans_raw (Date, Timestamp, TraceId, SpanId, SpanName, SpanKind, ServiceName, ResourceAttributes,
    SpanAttributes, Duration, StatusCode, RolloutId, AttemptId, Source, Kind, Sequence, Topic, Partition, Offset)
WITH intDiv(n, 20) AS rollout, n % 20 AS at, 1795000000000 + rollout * 20 AS ms, lower(hex(sipHash64(rollout))) AS salt,
    right(lower(hex(ms)), 12) AS t,
    concat(substring(t, 1, 8), '-', substring(t, 9, 4), '-7', substring(salt, 1, 3), '-a', substring(salt, 4, 3), '-',
        substring(lower(hex(sipHash64(rollout, 1))), 1, 12)) AS id
SELECT toDate(fromUnixTimestamp64Milli(toInt64(ms), 'UTC')), fromUnixTimestamp64Milli(toInt64(ms + at * 100)),
    lower(hex(sipHash128(rollout))), lower(hex(sipHash64(n))),
    ['chat', 'add', 'multiply', 'agent', 'reward'][at % 5 + 1],
    'Internal', 'benchmark', map('service.name', 'benchmark'),
    map('gen_ai.request.model', 'policy', 'gen_ai.input.messages',
        repeat(concat(lower(hex(sipHash64(n))), ' some words of a prompt '), 8)),
    1000000 + sipHash64(n) % 1000000000, 'Ok', id, concat(id, 'a'), if(at % 5 = 0, 'proxy', 'agent'),
    ['llm', 'tool', 'tool', 'agent', 'reward'][at % 5 + 1], at, 'events', rollout % 8, n
FROM (
    SELECT intDiv(number, 200000) * 200000 + (number % 200000) * 7919 % 200000 AS n FROM numbers({first}, {count})
)
SETTINGS max_insert_block_size = 10000, min_insert_block_size_rows = 10000, min_insert_block_size_bytes = 0,
    max_threads = 1, max_insert_threads = 1, parts_to_throw_insert = 100000, parts_to_delay_insert = 100000
"""


def milliseconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def questions(writer: ClickHouseWriter, store: ClickHouseStore, rows: int) -> dict[str, float]:
    """What people ask, of a store with ``rows`` spans."""
    fill(writer, rows)
    ids = [row[0] for row in store.sql("SELECT RolloutId FROM spans_raw ORDER BY cityHash64(SpanId) LIMIT 200").rows]
    one = "SELECT * FROM spans WHERE RolloutId = {rollout:String}"
    assert len(store.sql(one, {"rollout": ids[0]}).rows) == SPANS_PER_ROLLOUT
    times = [milliseconds(lambda of=of: store.sql(one, {"rollout": of})) for of in ids]  # type: ignore[misc]
    cuts = statistics.quantiles(times, n=100)
    by_name = "SELECT SpanName, count() FROM spans GROUP BY SpanName"
    size = "SELECT sum(bytes_on_disk) / sum(rows) FROM system.parts WHERE active AND table = 'spans_raw'"
    return {
        "one_rollout_p50_ms": cuts[49],
        "one_rollout_p99_ms": cuts[98],
        "scan_by_name_ms": min(milliseconds(lambda: store.sql(by_name)) for _ in range(3)),
        "bytes_per_span": float(store.sql(size).rows[0][0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer spans, for a look")
    parser.add_argument("--rows", type=int, help="spans stored when it is asked (default 1 M; quick 200 k)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    count = 10_000 if options.quick else 200_000
    rows = options.rows or (200_000 if options.quick else 1_000_000)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        broker = LocalKafka(Path(folder) / "kafka", port=0)
        broker.up()
        try:
            settings = load_settings(
                kafka_bootstrap_servers=broker.bootstrap_servers, clickhouse_dsn=f"chdb://{folder}/store"
            )
            log, writer = KafkaLog(settings), ClickHouseWriter(settings)
            asyncio.run(log.create_topics())
            writer.migrate()
            store = ClickHouseStore(settings)
            producer = log.producer()
            figures["mean_body_bytes"] = publish(producer, settings.topics.events, count)
            producer.close()
            used = asyncio.run(through_the_sink(log, settings, writer, count))
            figures["spans_per_cpu_second"] = count / used
            bodies = [codec.encode(span) for span in spans(count)]
            figures["floor_spans_per_cpu_second"] = count / floor(writer, bodies)
            fresh = asyncio.run(freshness(log, settings, writer, store))
            figures["freshness_p99_ms"] = statistics.quantiles(fresh, n=100)[98] * 1e3
            writer.client.command("TRUNCATE TABLE spans_raw")
            figures |= questions(writer, store, rows)
            store.close()
            writer.close()
        finally:
            broker.down()
    figures["ratio_to_floor"] = figures["spans_per_cpu_second"] / figures["floor_spans_per_cpu_second"]
    table = Table("", "", title=f"{count:,} spans through the sink; questions to {rows:,}")
    for name, figure in figures.items():
        table.add_row(name, f"{figure:,.2f}" if figure < 100 else f"{figure:,.0f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
