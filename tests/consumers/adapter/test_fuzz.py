"""Random and mutated records over every topic: no crash, and each is accepted or among the dead letters.

``FUZZ_RECORDS=100000`` makes more of them, ``FUZZ_SEED=7`` others.
"""

import asyncio
import math
import os
import random
from collections import Counter

import pytest

from millstream.consumers.adapter.adapter import Adapter, AdapterPolicy
from millstream.consumers.adapter.retry import BACKOFF_S
from millstream.consumers.adapter.settle import FoldPolicy
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.clickhouse import ClickHouseSink
from millstream.consumers.sink.sink import SinkRole
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import CodecError
from millstream.schemas.ids import derived_id
from millstream.schemas.wire import codec, records, status
from millstream.schemas.wire.records import (
    RECORD_TYPES,
    AttemptEvent,
    Control,
    DeadLetter,
    RolloutEnd,
    RolloutTask,
    Settled,
    Span,
    TrainingStep,
    Triplet,
    Worker,
)

RECORDS = int(os.environ.get("FUZZ_RECORDS", "10000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
IDENTITY = {  # what makes a record the same one in the store
    "tasks_raw": (RolloutTask, lambda r: (r.rollout_id, r.attempt)),
    "attempts_raw": (AttemptEvent, lambda r: (r.rollout_id, r.attempt_id, r.status)),
    "rollout_ends_raw": (RolloutEnd, lambda r: r.rollout_id),
    "spans_raw": (Span, lambda r: (r.rollout_id, r.attempt_id, r.source, r.sequence, r.span_id)),
    "triplets_raw": (Triplet, lambda r: (r.rollout_id, r.attempt_id, r.turn)),
    "controls_raw": (Control, lambda r: (r.kind, r.name)),
    "training_steps_raw": (TrainingStep, lambda r: (r.experiment_id, r.epoch, r.step)),
    "workers_raw": (Worker, lambda r: r.worker_id),
    "dead_letters_raw": (DeadLetter, lambda r: (r.topic, r.partition, r.offset, r.role, r.reason)),
}
TOKENS = ("prompt_token_ids", "response_token_ids", "response_logprobs")
SCHEMAS = {t: codec.load_schema(t.__name__) for t in RECORD_TYPES}


def encoded(record):
    """As another publisher encodes it, whatever its numbers are."""
    its = codec.CODECS[type(record)]
    checks, its._checks = its._checks, []
    try:
        return codec.encode(record)
    finally:
        its._checks = checks


class Fuzz:
    """Makes records: some as a role would write them, some with anything in their fields, some broken."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.rollouts = [derived_id(1_800_000_000_000_000_000, seed, n) for n in range(RECORDS // 50)]
        self.attempts = [f"a{n}" for n in range(3)]
        self.made = []

    def value(self, avro):
        choice = self.random
        if isinstance(avro, list):
            return self.value(choice.choice(avro))
        if isinstance(avro, dict):
            if avro["type"] == "map":
                return {self.value("string"): self.value(avro["values"]) for _ in range(choice.randrange(3))}
            if avro["type"] == "array":
                return tuple(self.value(avro["items"]) for _ in range(choice.randrange(3)))
            return getattr(records, avro["name"])(**{f["name"]: self.value(f["type"]) for f in avro["fields"]})
        return {
            "null": lambda: None,
            "string": lambda: choice.choice(["", "x", "\0", "é\U0001f600", "'; --", "9" * 40, "succeeded"]),
            "bytes": lambda: choice.randbytes(choice.randrange(12)),
            "boolean": lambda: choice.random() < 0.5,
            "int": lambda: choice.choice([0, 1, -1, 2**31 - 1, -(2**31), choice.randrange(100)]),
            "long": lambda: choice.choice([0, 1, -1, 2**63 - 1, -(2**63), 1_800_000_000_000_000_000]),
            "double": lambda: choice.choice([0.0, -1.5, 1e308, math.inf, -math.inf, math.nan, 1e-9]),
        }[avro]()

    def record(self, kind):
        """Fields are often what they should be, so that rollouts are claimed, run and end."""
        choice = self.random
        fields = {f["name"]: self.value(f["type"]) for f in SCHEMAS[kind]["fields"]}
        sane = {
            "rollout_id": choice.choice(self.rollouts),
            "attempt_id": choice.choice(self.attempts),
            "attempt": 1,
            "max_attempts": choice.choice([1, 2]),
            "lost_attempts": 0,
            "lease_s": 80_000.0,
            "timeout_s": 60.0,
            "unresponsive_s": None,
            "priority": choice.choice(["high", "normal", "low"]),
            "retry_on": (),
            "status": choice.choice([*sorted(status.TERMINAL), status.PREPARING, status.PREPARING, status.RUNNING]),
            "span_counts": {},
        }
        fields |= {name: value for name, value in sane.items() if name in fields and choice.random() < 0.97}
        uneven = choice.random() < 0.002  # the sink looks for each such row by halves
        fields |= {n: choice.randbytes(4 * choice.randrange(3) + uneven) for n in TOKENS if n in fields}
        if kind is AttemptEvent and fields["status"] == status.PREPARING and choice.random() < 0.95:
            task = self.record(RolloutTask)
            fields |= {"rollout_id": task.rollout_id, "task": encoded(task)}
        return kind(**fields)

    def broken(self, body):
        choice, body = self.random, bytearray(body)
        match choice.randrange(6):
            case 0:
                return bytes(body[: choice.randrange(len(body))])
            case 1:
                return bytes(body) + choice.randbytes(choice.randrange(1, 9))
            case 2:
                return choice.randbytes(choice.randrange(60))
            case 3:  # another fingerprint
                body[2:10] = choice.randbytes(8)
            case 4:  # another record's body
                return bytes(body[:10]) + choice.choice(self.made or [bytes(body)])[10:]
            case _:
                for _ in range(choice.randrange(1, 4)):
                    body[choice.randrange(len(body))] ^= 1 << choice.randrange(8)
        return bytes(body)

    def send(self, log, topics):
        choice = self.random
        topic = choice.choice([topics.events, *(topic.name for topic in topics.stored)])
        usual = {topics.events: (AttemptEvent, AttemptEvent, Span, Span, Span), topics.triplets: (Triplet, RolloutEnd)}
        usual |= {topics.control: (Control,), topics.workers: (Worker,), topics.dead: (DeadLetter,)}
        usual |= {topics.training: (TrainingStep,)}
        kind = choice.choice(usual.get(topic, (RolloutTask,)) if choice.random() < 0.95 else RECORD_TYPES)
        record = self.record(kind)
        body = encoded(record)
        if choice.random() < 0.02 and self.made:
            body = choice.choice(self.made)  # once more
        self.made.append(body)
        if choice.random() < 0.3:
            body = self.broken(body)
        key = getattr(record, "rollout_id", None)
        if choice.random() < 0.05:
            key = choice.choice([None, "", "\udcff\udc80", "x" * 300])
        headers = {"kind": choice.choice([b"", b"retry", b"\xff", b"succeeded"])} if choice.random() < 0.2 else {}
        log.producer().send(topic, body, key=key, headers=headers)


@pytest.fixture
def settings(tmp_path):
    return load_settings(clickhouse_dsn=f"chdb://{tmp_path}/store", kafka_partitions=3)


def everything(log):
    return {name: [r for part in parts for r in part.records if r] for name, parts in log.partitions.items()}


def decoded(value):
    try:
        return codec.decode(value)
    except CodecError:
        return None


async def adapt(log, topics):
    """Until the adapter has read all events and decided what it can. Returns the rollouts still open."""
    policy = AdapterPolicy(fold=FoldPolicy(backoff_s=dict.fromkeys(BACKOFF_S, (0.0, 0.0))))
    adapter = Adapter(log, topics, transactional_id="a", policy=policy)
    stop = asyncio.Event()
    running = asyncio.create_task(adapter.run(stop))
    async with asyncio.timeout(200):
        await adapter.wait_ready()
        while not running.done() and not adapter.idle:  # noqa: ASYNC110 - a property
            await asyncio.sleep(0.05)
    still_open = {rollout_id for part in adapter._parts.values() for rollout_id in part.fold.open}
    stop.set()
    await running
    return still_open


async def test_every_record_is_accepted_or_among_the_dead_letters(settings, writer, store):
    topics = settings.topics
    log, fuzz = MemoryLog(topics, encode=True), Fuzz(SEED)
    for _ in range(RECORDS):
        fuzz.send(log, topics)
    sent = everything(log)
    still_open = await adapt(log, topics)
    await store_all(log, writer, settings)

    # The adapter: an event that it can't use is dead, once, and nothing else is.
    letters = [codec.decode(record.value) for record in everything(log)[topics.dead][len(sent[topics.dead]) :]]
    dead = Counter(
        (x.topic, x.partition, x.offset) for x in letters if (x.role, x.reason) == ("adapter", "undecodable")
    )
    forged = {  # what looks like the adapter's own marks: these rollouts have been settled, it believes
        value.rollout_id for r in sent[topics.events] if isinstance(value := decoded(r.value), RolloutEnd)
    }
    sure = 0
    for record in sent[topics.events]:
        times = dead.pop((*record.partition, record.offset), 0)
        value, key = decoded(record.value), record.key or ""
        if isinstance(value, AttemptEvent) and value.status == status.PREPARING and not claims(value):
            assert times <= 1, record  # it may come too late to be looked at
        elif isinstance(value, (AttemptEvent, Span, RolloutEnd)):
            assert times == 0, record
        elif key not in forged and key not in still_open:
            sure += 1
            assert times == 1, record
    assert dead == {}
    assert sure > RECORDS / 50

    # The sink: what can't be decoded is dead (among the events that is the adapter's), all else is in its table.
    dead = Counter((x.topic, x.partition, x.offset) for x in letters if x.role == "sink")
    stored = {table: set() for table in IDENTITY}
    for record in (r for topic in topics.stored for r in everything(log)[topic.name]):
        topic, place, value = record.partition.topic, (*record.partition, record.offset), decoded(record.value)
        uneven = any(len(getattr(value, name, None) or b"") % 4 for name in TOKENS)
        value = None if isinstance(value, Settled) else value  # it has no table
        assert dead.pop(place, 0) == (uneven or (value is None and topic != topics.events)), record
        for table, (kind, identity) in IDENTITY.items():
            copy = kind is RolloutEnd and topic != topics.events
            if isinstance(value, kind) and not copy and not uneven:
                stored[table].add(identity(value))
        if isinstance(value, AttemptEvent) and (task := claims(value)):
            stored["tasks_raw"].add(IDENTITY["tasks_raw"][1](task))
    assert dead == {}
    counts = {table: store.sql(f"SELECT count() FROM {table} FINAL").rows[0][0] for table in IDENTITY}
    assert counts == {table: len(found) for table, found in stored.items()}


def claims(event):
    """The task that an event claims, if it holds a good one."""
    task = decoded(event.task or b"")
    return task if isinstance(task, RolloutTask) and task.rollout_id == event.rollout_id else None


async def store_all(log, writer, settings):
    """Runs sinks until one finds nothing new: a sink that is stopped drains only for a while."""
    stop = asyncio.Event()
    stop.set()
    while True:
        sink = SinkRole(log, ClickHouseSink(writer, settings.topics.events), settings)
        await sink.run(stop)
        if not sink.stats.records:
            return
