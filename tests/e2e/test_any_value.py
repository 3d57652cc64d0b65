"""Any value that Python, JSON, OTLP or a model can produce passes every role: no process ends, each rollout ends once,
and SQL's JSON functions read what is stored.

``ANY_VALUES=100000`` makes more of them, ``ANY_VALUES_SEED=7`` others.
"""

import asyncio
import json
import math
import os
import random
import struct
from collections import Counter
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import factories
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from sink_rig import eventually, role
from typer.testing import CliRunner

import millstream as ms
from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.read_to_end import read_to_end
from millstream.consumers.runner.runner import Runner
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.pipeline.algorithms.rows import rows_of, usable
from millstream.pipeline.cli import output
from millstream.pipeline.cli.main import app
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.training.collector import Collector
from millstream.pipeline.training.groups import Group
from millstream.pipeline.training.report import mean_reward
from millstream.producers.agent.emit import EmitError
from millstream.producers.tasks import TaskLine, TaskPublisher, group_of
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import CodecError, TooLarge
from millstream.schemas.spans import semconv
from millstream.schemas.spans.otlp import from_otlp
from millstream.schemas.spans.text import utf8
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutEnd

VALUES = int(os.environ.get("ANY_VALUES", "10000"))
SEED = int(os.environ.get("ANY_VALUES_SEED", "1"))
IN_A_ROLLOUT = 50  # values

TEXTS = ["", "a", "grün", "\0", "\ud83d", "\ude00", "\ud83d\ude00", "😀", "\ufeff", "\u2028", "\x1b[31m", "NaN", "null"]
TEXTS += [r"smile \ud83d", r'{"a": "\ud83d"}', "{", '{"a": NaN}', '{"a": 1e999}', "'; DROP TABLE", "x" * 300]
LONG = [
    "[" * 300_000,
    '{"a":' * 60_000,
    "\ud83d" * 100_000,
    json.dumps(["y" * 40_000] * 8),
    r'"\ud83d"' + " " * 270_000,
]
NUMBERS = [0, -1, 1 << 31, 1 << 53, 1 << 63, 1 << 64, -(1 << 64), 10**400, True]
FLOATS = [0.0, -0.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, 0.1]
OTHERS = [None, b"", b"\xff\0", datetime.min, datetime.max.replace(tzinfo=UTC), date.min, date.max, timedelta.max]
OTHERS += [Decimal("NaN"), Decimal("1e999"), UUID(int=0), {1, 2}, frozenset(), range(3), object, Ellipsis, 1j, 10**5000]
NAMES = ["", "a", "\ud83d", "\0", "b.c", "gen_ai.operation.name", "error.type", "openinference.span.kind", "x" * 300]
NAMES += [
    "gen_ai.prompt.0.content",
    "gen_ai.prompt.²",
    "llm.tools.0.tool.json_schema",
    "output.value",
    "logprobs.content",
]
NAMES += ["prompt_token_ids", "agentlightning.reward.0.value", "agentlightning.reward.1.value", semconv.RESPONSE_ID]
NAMES += [semconv.REQUEST_MESSAGES, semconv.OUTPUT_MESSAGES, semconv.FINISH_REASONS, semconv.EVALUATION_SCORE]


class Unprintable:
    def __repr__(self):
        raise KeyError("its own")


class Values:
    """Makes values."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def json(self, depth=3):
        """What JSON can hold, and what Python's JSON writes beyond it."""
        pick = self.random.random()
        if depth and pick < 0.15:
            return [self.json(depth - 1) for _ in range(self.random.randrange(4))]
        if depth and pick < 0.35:
            return {self.text(): self.json(depth - 1) for _ in range(self.random.randrange(4))}
        if pick < 0.6:
            return self.text()
        return self.random.choice([None, *NUMBERS, *FLOATS])

    def any(self):
        """What Python can hold."""
        pick = self.random.random()
        if pick < 0.002:
            return nested(300_000)
        if pick < 0.02:
            value = [math.nan]
            value.append(value)
            return value
        if pick < 0.2:
            return self.random.choice([*OTHERS, Unprintable()])
        if pick < 0.3:
            return {self.random.choice([1, None, (1, 2), math.nan, b"k", "\ud83d"]): self.json()}
        if pick < 0.4:
            return [self.random.choice(OTHERS), self.json()]
        return self.json()

    def text(self):
        return self.random.choice(TEXTS if self.random.random() < 0.998 else LONG)

    def attributes(self, make):
        return {self.random.choice(NAMES): make() for _ in range(self.random.randrange(4))}

    def otlp(self, rollout):
        """One span; protobuf itself keeps its strings valid."""
        request = ExportTraceServiceRequest()
        resource = request.resource_spans.add()
        span = resource.scope_spans.add().spans.add()
        for name, value in ((semconv.ROLLOUT_ID, rollout.rollout_id), (semconv.ATTEMPT_ID, rollout.attempt_id)):
            resource.resource.attributes.add(key=name).value.string_value = value
        span.trace_id, span.span_id = self.random.randbytes(16), self.random.randbytes(8)
        span.name = utf8(self.text())
        span.start_time_unix_nano = self.random.choice([0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
        for name, value in self.attributes(self.json).items():
            given = span.attributes.add(key=utf8(name)).value
            if isinstance(value, float):
                given.double_value = value
            elif isinstance(value, int):
                given.int_value = value if abs(value) < 1 << 63 else 0
            elif isinstance(value, list):
                for inner in value:
                    given.array_value.values.add().string_value = utf8(str(type(inner)))
            else:
                given.string_value = utf8(value if isinstance(value, str) else "")
        return request

    def call(self, task, attempt_id, number):
        """A model call as a proxy may write it: any text, any bytes of numbers."""
        choice = self.random.choice
        ids = choice([b"", struct.pack("<i", 7), struct.pack("<i", -1), struct.pack("<i", 2**31 - 1), None])
        if self.random.random() < 0.01:  # rare: the sink looks for such a row by halves
            ids = b"\1\2\3\4\5"
        logprobs = choice([struct.pack("<f", x) for x in (-0.5, 0.0, 1.0, -3e38, math.nan, -math.inf)])
        attributes = {name: value for name, value in self.attributes(self.text).items() if name != semconv.RESPONSE_ID}
        return factories.call(
            task,
            attempt_id,
            f"r{number}",
            attributes={semconv.RESPONSE_ID: f"r{number}", semconv.RESPONSE_MESSAGE: self.text()} | attributes,
            prompt_token_ids=choice([ids, struct.pack("<3i", 1, 2, 3)]),
            response_token_ids=choice([ids, struct.pack("<i", 7)]),
            response_logprobs=logprobs,
            model_version=choice([None, "run.0.1", "\ud83d"]),
        )


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


class Agent:
    """Emits values in every way, and returns one. What the emitters raise is theirs to raise, and nothing else is."""

    def __init__(self, log, topics):
        self.producer, self.topics = log.producer(), topics
        self.emitted = 0
        self.unexpected = []

    def __call__(self, task, rollout):
        values = Values(task["seed"])
        ways = [
            lambda: ms.emit_span(values.text(), values.attributes(values.any)),
            lambda: ms.emit_object(values.any(), values.attributes(values.json)),
            lambda: ms.emit_annotation({"value": values.any()}),
            lambda: ms.emit_message(values.text(), values.attributes(values.any)),
            lambda: ms.emit_reward(values.random.choice([*FLOATS, *NUMBERS]), values.text()),
            lambda: ms.emit_exception(ValueError(values.text())),
            lambda: self.operate(values),
            lambda: self.export(values, rollout),
        ]
        for _ in range(IN_A_ROLLOUT):
            self.emitted += 1
            try:
                values.random.choice(ways)()
            except EmitError:
                pass
            except Exception as error:
                self.unexpected.append(error)
        return values.any()

    def operate(self, values):
        with ms.operation(values.text() or "o", values.attributes(values.json)) as operation:
            operation.set_input(value=values.any())
            operation.set_output(values.any())

    def export(self, values, rollout):
        spans, _ = from_otlp(values.otlp(rollout))
        for span in spans:
            with suppress(CodecError, TooLarge):  # a time beyond 64 bits: the receiver reports it to the exporter
                self.producer.send(self.topics.events, span, key=span.rollout_id)


def histories(values, number):
    """Rollouts whose events a runner and a proxy wrote: their model calls hold anything."""
    for _ in range(number):
        task = factories.task(experiment_id="calls", input=values.random.choice(TEXTS))
        yield task.rollout_id, factories.event(task, "a", "preparing")
        spans = [values.call(task, "a", n) for n in range(4)]
        rewards = [factories.reward(task, "a", values.random.choice(FLOATS)) for _ in range(2)]
        for span in (*spans, *rewards):
            yield task.rollout_id, span
        counts = {"proxy": len(spans), "agent": len(rewards)}
        yield task.rollout_id, factories.event(task, "a", "succeeded", span_counts=counts, output=values.text())


@pytest.fixture(params=["live", "encoded", pytest.param("kafka", marks=[pytest.mark.kafka, pytest.mark.slow])])
def bed(request, folder, monkeypatch, tmp_path):
    """A log, its settings, and how many values go through it."""
    kafka = request.param == "kafka"
    make = request.getfixturevalue("kafka_settings") if kafka else load_settings
    settings = make(
        proxy_url="",
        clickhouse_dsn=f"chdb://{folder}",
        clickhouse_database=f"any_{request.param}",
        kafka_partitions=4,
        blob_url=str(tmp_path / "blobs"),
        max_record_bytes=4 << 20,
    )
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DSN", settings.clickhouse_dsn)
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DATABASE", settings.clickhouse_database)
    monkeypatch.setattr(output.out, "width", 10_000)
    log = KafkaLog(settings) if kafka else MemoryLog(settings.topics, encode=request.param == "encoded")
    return log, settings, VALUES * 9 // 10 if request.param == "encoded" else VALUES // 10


async def through_all(log, settings, sink, store, agent, values, rollouts):
    """Runs the roles until all rollouts have ended; returns them as a trainer collects them."""
    await log.create_topics()
    stop = asyncio.Event()
    collector = Collector(log, settings.topics, log.producer())
    await collector.start()
    running = [
        asyncio.create_task(each.run(stop))
        for each in (
            Runner(log, settings, agent, processes=0, concurrency=8, instrument="none"),
            Adapter(log, settings.topics, transactional_id="any"),
            sink,
        )
    ]
    lines = [TaskLine(input={"seed": n, "value": values.json()}) for n in range(rollouts)]
    tasks = [task for line in lines for task in group_of(line, settings)]
    recorded = list(histories(values, rollouts))
    expected = [task.rollout_id for task in tasks] + list(dict.fromkeys(key for key, _ in recorded))
    collector.expect(expected)
    await TaskPublisher(log.producer(), settings).publish(tasks)
    producer = log.producer()
    for key, record in recorded:
        producer.send(settings.topics.events, record, key=key)
    collecting = asyncio.create_task(collector.collect(expected))
    async with asyncio.timeout(240):
        await asyncio.wait([collecting, *running], return_when=asyncio.FIRST_COMPLETED)
        for role_of in running:
            assert not role_of.done(), role_of.result()
        finished = await collecting
    # A new group may get a new topic's partitions late: stopped before, the sink leaves them to its successor.
    made = sum(len(member.triplets) for member in finished)
    await eventually(lambda: stored_triplets(store) >= made, 120.0)
    stop.set()
    await asyncio.gather(*running)
    await collector.close()
    return finished


def stored_triplets(store):
    """With those that no table holds."""
    dead = "SELECT count() FROM dead_letters WHERE endsWith(source_topic, '.triplets')"
    return sum(store.sql(query).rows[0][0] for query in ("SELECT count() FROM triplets", dead))


async def test_any_value_passes_every_role(bed, writer_to):
    log, settings, number = bed
    writer, store = writer_to(settings)
    agent = Agent(log, settings.topics)
    sink = role(log, writer, settings)
    rollouts = max(number // (IN_A_ROLLOUT + 1), 4)
    finished = await through_all(log, settings, sink, store, agent, Values(SEED), rollouts)
    assert agent.unexpected == []
    assert agent.emitted >= 0.9 * number

    # Each rollout ended exactly once, by its own doing.
    ends = await ends_on(log, settings)
    assert set(ends.values()) == {1}
    assert len(ends) == len(finished) == 2 * rollouts
    reasons = [member.end.reason or "" for member in finished if member.end.status not in ("succeeded", "failed")]
    assert reasons == []

    # A trainer can use what is trainable.
    assert math.isfinite(mean_reward(finished))
    groups, _ = usable([Group("g", tuple(finished))], 100)
    rows, _, dropped = rows_of(groups)
    assert dropped == 0
    assert rows
    assert all(math.isfinite(x) for row in rows for x in (*row.logprobs, *row.advantages))

    # The store holds all of them, and its JSON functions read what was written as JSON.
    assert len(store.rollouts()) == 2 * rollouts
    for column in ("input FROM tasks WHERE experiment_id != 'calls'", "output FROM attempts WHERE attempt_id != 'a'"):
        name = column.split()[0]
        bad = store.sql(f"SELECT {column} AND isNotNull({name}) AND not isValidJSON({name})").rows
        assert bad == []
    objects = "SpanAttributes['agentlightning.object.json']"
    bad = store.sql(
        f"SELECT {objects} AS v FROM spans WHERE v NOT IN ('') AND v NOT LIKE 'millstream-blob%' AND NOT isValidJSON(v)"
    )
    assert bad.rows == []

    # And so do programs that read the commands' JSON.
    some = [member.end.rollout_id for member in finished[:3] + finished[-3:]]
    for command in (
        ["rollouts", "--limit", "10000"],
        ["triplets", "--limit", "100"],
        *(["spans", one] for one in some),
    ):
        ran = await asyncio.to_thread(CliRunner().invoke, app, [*command, "--json"])
        assert ran.exit_code == 0, (command, ran.exception)
        json.loads(ran.stdout, parse_constant=pytest.fail)


async def ends_on(log, settings):
    """How many ends each rollout has."""
    topics = settings.topics
    partitions = [Partition(topics.triplets, n) for n in range(topics.partitions)]
    found = Counter()
    async for record in read_to_end(log, partitions):
        value = codec.decode(record.value)
        if isinstance(value, RolloutEnd):
            found[value.rollout_id] += 1
    return found


@pytest.fixture
def writer_to():
    """Opens the store of some settings."""
    opened = []

    def open_both(settings):
        writer = ClickHouseWriter(settings)
        writer.migrate()
        opened.extend([ClickHouseStore(settings), writer])
        return writer, opened[-2]

    yield open_both
    for each in opened:
        each.close()
