"""Whatever is on the topic, or a custom adapter makes of it: each rollout ends, and only its own is touched."""

import asyncio
import json
import math
import random
import re
import struct
import subprocess
import sys
import time

import pytest
from adapter_rig import Bed, Reader, adapter_on, counted, history, write
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from factories import call, event, reward, span, task
from prometheus_client import CollectorRegistry

from millstream.consumers.adapter.adapter import AdapterPolicy
from millstream.consumers.adapter.transaction import Budget, BudgetPolicy
from millstream.consumers.adapter.triplets import to_triplets
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.memory_producer import MemoryTransactionalProducer
from millstream.deploy.kafka.local import resolve_jars
from millstream.schemas.errors import LogUnavailable, TooLarge
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import DeadLetter, ErrorInfo, RolloutEnd, Triplet
from millstream.schemas.wire.topics import Topics

HALF = r'[{"role": "user", "content": "smile \ud83d"}]'  # pure ASCII


async def ends_of(bed, *histories, **options):
    """The ends of the rollouts with these histories, and their triplets; innocent ones stand before and after."""
    tasks = [records[0] for records in histories]
    innocents = [task() for _ in range(3)]
    reader = Reader(bed, bed.topics.triplets)
    async with adapter_on(bed, **options) as adapter:
        await write(bed, *history(innocents[0]))
        for records in histories:
            await write(bed, *records)
        await write(bed, *history(innocents[1]), *history(innocents[2]))
        expected = len(tasks) + len(innocents)
        await reader.until(lambda found: sum(isinstance(v, RolloutEnd) for _, v in found) >= expected)
        assert adapter is not None
    ends = {v.rollout_id: v for _, v in reader.found if isinstance(v, RolloutEnd)}
    assert len(ends) == expected == sum(isinstance(v, RolloutEnd) for _, v in reader.found)
    return ends, [v for _, v in reader.found if isinstance(v, Triplet)], innocents


def attempt(of, *spans):
    counts = {source: sum(s.source == source for s in spans) for source in ("agent", "proxy")}
    return event(of, "a", "preparing"), *spans, event(of, "a", "succeeded", span_counts=counts)


DIALECT_SPANS = {
    "OpenInference": {
        "openinference.span.kind": "LLM",
        "llm.input_messages.0.message.role": "user",
        "llm.input_messages.0.message.content": r"smile \ud83d",
        "llm.tools.0.tool.json_schema": r'{"name": "smile \ud83d"}',
        "output.value": r'{"id": "\ud83d"}',
    },
    "events": {"gen_ai.operation.name": "chat", "gen_ai.event.content": HALF},
    "numbers": {"gen_ai.request.type": "chat", "gen_ai.prompt.²": "x", "gen_ai.prompt.0.role": "user"},
    "tokens": {"gen_ai.request.type": "chat", "prompt_token_ids": "[1e308]", "logprobs.content": "[1e308]"},
    "deep": {
        "openinference.span.kind": "LLM",
        "output.value": "[" * 300_000,
        "llm.tools.0.tool.json_schema": "{" * 9999,
    },
    "ours": {semconv.OPERATION: "chat", semconv.REQUEST_MESSAGES: HALF, semconv.RESPONSE_MESSAGE: "[" * 300_000},
}


@pytest.mark.parametrize("name", DIALECT_SPANS)
async def test_an_attribute_of_any_text_ends_its_rollout_and_no_adapter(bed, name):
    """A1 and A5."""
    of = task()
    given = span(of, "a", kind=semconv.LLM, attributes=DIALECT_SPANS[name])
    ends, triplets, innocents = await ends_of(bed, attempt(of, call(of, "a", "1"), given))
    assert ends[of.rollout_id].trainable
    assert all(ends[other.rollout_id].trainable for other in innocents)
    assert all(codec.encode(triplet) for triplet in triplets)


def one_triplet(**fields):
    return lambda trace: [
        Triplet(
            **{
                "rollout_id": trace.task.rollout_id,
                "attempt_id": trace.attempt_id,
                "group_id": "g",
                "turn": 0,
                "span_id": "s",
                "prompt": "",
                "response": "",
            }
            | fields
        )
    ]


def raising(error):
    def function(_trace):
        raise error

    return function


class Unprintable(Exception):
    def __str__(self):
        raise KeyError


WRONG = {
    "none": lambda trace: None,
    "a number": lambda trace: 3,
    "dicts": lambda trace: [{}],
    "spans": lambda trace: list(trace.spans),
    "one of another rollout": one_triplet(rollout_id="other"),
    "one of another attempt": one_triplet(attempt_id="other"),
    "a prompt of bytes": one_triplet(prompt=b"bytes"),
    "a turn beyond an int": one_triplet(turn=1 << 40),
    "a turn of text": one_triplet(turn="1"),
    "tokens in a list": one_triplet(prompt_token_ids=[1, 2]),
    "a reward of text": one_triplet(reward="1"),
    "metadata of numbers": one_triplet(metadata={"a": 1}),
    "exit": lambda trace: sys.exit(3),
    "cancel": raising(asyncio.CancelledError()),
    "recursion": raising(RecursionError()),
    "memory": raising(MemoryError()),
    "half a character": raising(ValueError("smile \ud83d")),
    "unprintable": raising(Unprintable()),
    "endless": raising(ValueError("x" * 20_000_000)),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_custom_adapter_that_fails_ends_its_rollout_untrainable(bed, name):
    """A1."""
    of = task()
    chosen = lambda trace: WRONG[name](trace) if trace.task.rollout_id == of.rollout_id else to_triplets(trace)  # noqa: E731
    ends, triplets, innocents = await ends_of(bed, history(of), to_triplets=chosen)
    assert (ends[of.rollout_id].status, ends[of.rollout_id].trainable) == ("succeeded", False)
    assert ends[of.rollout_id].reason.startswith("the adapter's function failed: ")
    assert {t.rollout_id for t in triplets} == {other.rollout_id for other in innocents}


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


NUMBERS = {
    "token below 0": ({"response_token_ids": struct.pack("<i", -1)}, "a token id of the response is below 0"),
    "prompt below 0": ({"prompt_token_ids": struct.pack("<2i", 1, -(2**31))}, "a token id of the prompt is below 0"),
    "half a token": ({"prompt_token_ids": b"\1\0\0\0\1"}, "the prompt's token ids end within a number"),
    "nan": ({"response_logprobs": floats(math.nan)}, "a logprob is not finite"),
    "inf": ({"response_logprobs": floats(-math.inf)}, "a logprob is not finite"),
    "above 0": ({"response_logprobs": floats(1.0)}, "a logprob is 1, above 0"),
}


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
async def test_numbers_that_cannot_be_trained_on_are_named(bed, name, custom):
    """A4: by the default rules and by a custom adapter."""
    of = task()
    fields, why = NUMBERS[name]
    good = call(of, "a", "1")
    tokens = {n: getattr(good, n) for n in ("prompt_token_ids", "response_token_ids", "response_logprobs")}
    function = one_triplet(**tokens | fields) if custom else to_triplets
    chosen = lambda trace: (function if trace.task.rollout_id == of.rollout_id else to_triplets)(trace)  # noqa: E731
    ends, triplets, _ = await ends_of(bed, attempt(of, call(of, "a", "1", **fields)), to_triplets=chosen)
    assert (ends[of.rollout_id].trainable, ends[of.rollout_id].reason) == (False, why)
    assert [t.reason for t in triplets if t.rollout_id == of.rollout_id] == [why]


@pytest.mark.parametrize(
    ("values", "total", "trainable"),
    [
        ((1e308, 1e308), None, False),
        ((3e38, 3e38), 6e38, False),
        ((math.nan, 1.0), 1.0, False),
        ((-math.inf,), None, False),
        ((1e30, -1e30, 2.0), 2.0, True),
    ],
)
async def test_rewards_and_their_sum_are_finite(bed, values, total, trainable):
    """A4."""
    of = task()
    spans = [reward(of, "a", value) for value in values]
    ends, triplets, _ = await ends_of(bed, attempt(of, call(of, "a", "1"), *spans))
    end = ends[of.rollout_id]
    assert (end.reward, end.trainable) == (total, trainable)
    assert trainable or "reward" in end.reason or "earned" in end.reason
    assert all(t.reward is None or abs(t.reward) < 3.4e38 for t in triplets)


async def test_an_agents_own_span_cannot_bring_token_ids(bed):
    """A4: neither in its fields nor as attributes of a dialect."""
    of = task()
    forged = call(of, "a", "2", source=semconv.SOURCE_AGENT)
    listed = span(
        of,
        "a",
        kind=semconv.LLM,
        attributes={"prompt_token_ids": "[1]", "response_token_ids": "[2]", "logprobs.content": "[0.0]"},
    )
    ends, triplets, _ = await ends_of(bed, attempt(of, call(of, "a", "1"), forged, listed))
    mine = [t for t in triplets if t.rollout_id == of.rollout_id]
    assert [t.trainable for t in mine] == [True, False, False]
    assert {t.reason for t in mine[1:]} == {
        "its token ids come from the agent, not from the proxy; [triplets] trust_agents = true takes them"
    }
    assert ends[of.rollout_id].trainable


async def test_the_last_attempt_number_ends_the_rollout(bed):
    """A6: the next one would not fit a record."""
    of = task(attempt=2**31 - 1, max_attempts=2**31 - 1, max_lost_attempts=2**31 - 1)
    ends, _, _ = await ends_of(bed, [event(of, "a", "preparing"), event(of, "a", "failed")])
    assert ends[of.rollout_id].status == "failed"


@pytest.mark.parametrize("bed", ["live", "encoded"], indirect=True)
async def test_an_end_whose_texts_are_too_large_is_written_without_them(bed, monkeypatch):
    """A2: error messages, states and triplets may have any length."""
    monkeypatch.setattr(bed.log, "max_record_bytes", 20_000)
    failed, large = task(input=json.dumps("x" * 9_000), state=b"s" * 8_000), task()
    function = one_triplet(prompt="y" * 25_000)
    chosen = lambda trace: (function if trace.task.rollout_id == large.rollout_id else to_triplets)(trace)  # noqa: E731
    error = ErrorInfo(type="ValueError", message="m" * 9_000, stack="")
    records = event(failed, "a", "preparing"), event(failed, "a", "failed", error=error)
    ends, _, _ = await ends_of(bed, records, history(large), to_triplets=chosen)
    assert (ends[failed.rollout_id].status, len(ends[failed.rollout_id].reason)) == ("failed", 4000)
    assert ends[large.rollout_id].reason.startswith("too_large: ")


class RefusingLog(MemoryLog):
    """As Kafka with a topic whose limit is below the setting: what was sent is refused when it is acknowledged."""

    def __init__(self, topics, limit, most=1 << 60):
        super().__init__(topics, encode=True)
        self.limit, self.most, self.transactions = limit, most, []

    def transactional_producer(self, transactional_id):
        return RefusingProducer(self, transactional_id)


class RefusingProducer(MemoryTransactionalProducer):
    def begin_transaction(self):
        super().begin_transaction()
        self.sent = []

    def send(self, topic, value, *, on_ack=None, **options):
        value = value if isinstance(value, bytes) else codec.encode(value)
        self.sent.append(len(value))
        # A batch is refused as a whole.
        refused = max(self.sent) > self._log.limit
        super().send(topic, value, on_ack=None, **options)
        on_ack(TooLarge(f"{topic}: too large") if refused else None, -1 if refused else 0)

    def commit_transaction(self, timeout_s):
        self._log.transactions.append(sum(self.sent))
        super().commit_transaction(timeout_s)


@pytest.mark.parametrize("bed", ["live"], indirect=True)
async def test_a_triplet_above_the_topics_own_limit_ends_its_rollout(bed):
    """A2: the brokers refuse it, with whatever is in the same batch."""
    bed.log = RefusingLog(bed.topics, 20_000)
    of = task()
    large = call(of, "a", "1", attributes={semconv.REQUEST_MESSAGES: json.dumps("y" * 30_000)})
    registry = CollectorRegistry()
    ends, _, innocents = await ends_of(bed, attempt(of, large), registry=registry)
    assert ends[of.rollout_id].reason.startswith("too_large: ")
    assert all(ends[other.rollout_id].trainable for other in innocents)


@pytest.mark.parametrize("bed", ["live"], indirect=True)
async def test_a_dead_letter_above_the_topics_own_limit_goes_without_its_body(bed):
    """A2: a sibling of triplets."""
    bed.log = RefusingLog(bed.topics, 20_000)
    letters, of = Reader(bed, bed.topics.dead, 1), task()
    async with adapter_on(bed):
        await write(bed, b"\xc3\x01" + b"g" * 30_000, *history(of))
        (letter,) = await letters.until(lambda found: found)
    assert isinstance(letter, DeadLetter)
    assert letter.value is None


@pytest.mark.parametrize("bed", ["live"], indirect=True)
async def test_a_transaction_is_bounded_in_bytes(bed):
    """A3."""
    bed.log = RefusingLog(bed.topics, 1 << 30)
    tasks = [task() for _ in range(60)]
    large = {semconv.REQUEST_MESSAGES: json.dumps("y" * 50_000)}
    for of in tasks:
        await write(bed, *attempt(of, call(of, "a", "1", attributes=large)))
    reader = Reader(bed, bed.topics.triplets)
    policy = AdapterPolicy(budget=BudgetPolicy(first_bytes=200_000, most_bytes=400_000))
    async with adapter_on(bed, policy=policy):
        await reader.until(lambda found: sum(isinstance(v, RolloutEnd) for _, v in found) == len(tasks))
    assert max(bed.log.transactions) < 500_000


class SlowLog(MemoryLog):
    """Its producers' link takes ``per_s`` bytes a second. ``outages``: flushes that time out all the same."""

    def __init__(self, topics, per_s, outages=0):
        super().__init__(topics)
        self.per_s, self.outages = per_s, outages

    def transactional_producer(self, transactional_id):
        return SlowProducer(self, transactional_id)


class SlowProducer(MemoryTransactionalProducer):
    def begin_transaction(self):
        super().begin_transaction()
        self.left = 0

    def send(self, topic, value, **options):
        self.left += len(value if isinstance(value, bytes) else codec.encode(value))
        super().send(topic, value, **options)

    def flush(self, timeout_s):
        if self._log.outages:
            self._log.outages -= 1
        elif (took := self.left / self._log.per_s) <= timeout_s:
            time.sleep(took)
            return super().flush(timeout_s)
        time.sleep(timeout_s)
        self.left -= self._log.per_s * timeout_s
        raise LogUnavailable("records are not acknowledged")


SLOW = AdapterPolicy(budget=BudgetPolicy(first_bytes=50_000, send_s=0.1, slow_tries=3))


@pytest.mark.parametrize("bed", ["live"], indirect=True)
async def test_a_rollout_that_takes_too_long_to_send_ends_and_says_so(bed):
    """A3: its triplets would need a second; the brokers end a transaction before."""
    bed.log = SlowLog(bed.topics, per_s=1_000_000)
    of, beside = task(), task()
    large = call(of, "a", "1", attributes={semconv.REQUEST_MESSAGES: json.dumps("y" * 1_000_000)})
    registry = CollectorRegistry()
    ends, triplets, innocents = await ends_of(bed, attempt(of, large), history(beside), registry=registry, policy=SLOW)
    end = ends[of.rollout_id]
    assert (end.status, end.trainable, end.turns) == ("succeeded", False, 0)
    assert re.match(r"too_large: its 1,00\d,\d{3} bytes could not be sent within 0.1 s, in 3 tries", end.reason)
    assert "compression" in end.reason
    assert all(ends[other.rollout_id].trainable for other in (beside, *innocents))
    assert of.rollout_id not in {t.rollout_id for t in triplets}


@pytest.mark.parametrize("bed", ["live"], indirect=True)
async def test_a_dead_letter_that_takes_too_long_to_send_goes_without_its_body(bed):
    """A3: a sibling of triplets."""
    bed.log = SlowLog(bed.topics, per_s=1_000_000)
    letters, of = Reader(bed, bed.topics.dead, 1), task()
    async with adapter_on(bed, policy=SLOW):
        await write(bed, b"\xc3\x01" + b"g" * 1_000_000, *history(of))
        (letter,) = await letters.until(lambda found: found)
    assert letter.value is None


@pytest.mark.parametrize("bed", ["live"], indirect=True)
@pytest.mark.parametrize(("size", "outages"), [(20_000, 9), (90_000, 2)], ids=["small", "large"])
async def test_an_outage_costs_no_rollout_its_triplets(bed, size, outages):
    """A3: not even one that is large, while it is shorter than three tries."""
    bed.log = SlowLog(bed.topics, per_s=10_000_000, outages=outages)
    of = task()
    call_ = call(of, "a", "1", attributes={semconv.REQUEST_MESSAGES: json.dumps("y" * size)})
    ends, _, _ = await ends_of(bed, attempt(of, call_), policy=SLOW)
    assert ends[of.rollout_id].reason is None
    assert bed.log.outages == 0


def test_the_budget_grows_while_commits_are_fast_and_halves_when_they_are_not():
    """A3."""
    budget = Budget(BudgetPolicy(first_bytes=100, most_bytes=400, rollouts=3))
    budget.begin()
    assert [budget.takes(size) for size in (60, 60, 40)] == [True, False, True]
    assert budget.full
    budget.committed(0.1)
    budget.committed(0.1)
    budget.committed(0.1)
    assert budget.bytes == 400
    budget.begin()
    assert [budget.takes(1) for _ in range(4)] == [True, True, True, False]
    budget.committed(2.0)
    assert budget.bytes == 400
    budget.committed(9.0)
    budget.halve()
    assert budget.bytes == 100
    for _ in range(9):
        budget.halve()
    budget.begin()
    assert [budget.takes(1 << 30), budget.takes(1)] == [True, False]


class UnavailableLog(MemoryLog):
    def transactional_producer(self, transactional_id):
        producer = super().transactional_producer(transactional_id)
        self.called = asyncio.Event()
        loop = asyncio.get_running_loop()

        def begin():
            loop.call_soon_threadsafe(self.called.set)
            raise LogUnavailable("no broker answers")

        producer.begin_transaction = begin
        return producer


async def test_a_stop_is_heard_while_the_log_does_not_answer():
    """A2."""
    topics = Topics("t", partitions=4)
    bed = type("Bed", (), {"log": UnavailableLog(topics), "topics": topics})
    async with asyncio.timeout(10), adapter_on(bed):
        await write(bed, *history(task()))
        await bed.log.called.wait()


async def test_late_garbage_is_counted_once(bed):
    registry = CollectorRegistry()
    letters, of = Reader(bed, bed.topics.dead, 1), task()
    async with adapter_on(bed, registry=registry):
        await write(bed, *history(of), b"garbage")
        await letters.until(lambda found: found)
    assert counted(registry, "dead_letters", "reason") == {"undecodable": 1}


@pytest.mark.kafka
@pytest.mark.parametrize("known", [True, False], ids=["lowered before the start", "lowered while it runs"])
async def test_a_topics_limit_below_the_setting_stops_no_adapter(kafka_settings, caplog, known):
    """A2: on real Kafka."""
    settings = kafka_settings(max_record_bytes=400_000)
    log = KafkaLog(settings)
    await log.create_topics()
    bed = Bed(log, settings.topics)
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    lowered = ConfigResource(ResourceType.TOPIC, settings.topics.triplets)
    entry = ConfigEntry("max.message.bytes", "200000", incremental_operation=AlterConfigOpType.SET)
    lowered.add_incremental_config(entry)
    admin.incremental_alter_configs([lowered])[lowered].result(10)
    if known:
        await log.check()
        assert (
            f"topic {settings.topics.triplets} takes records of 200,000 bytes, but max_record_bytes is" in caplog.text
        )
    tasks = [task() for _ in range(6)]
    large = tasks[:2]
    # Random text: the brokers look at compressed batches.
    text = json.dumps("".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789ABCDEF", k=370_000)))
    records = [attempt(of, call(of, "a", "1", attributes={semconv.REQUEST_MESSAGES: text})) for of in large]
    ends, _, innocents = await ends_of(bed, *records, *(history(of) for of in tasks[2:]))
    assert {ends[of.rollout_id].reason[:11] for of in large} == {"too_large: "}
    assert all(ends[of.rollout_id].trainable for of in (*tasks[2:], *innocents))


@pytest.mark.slow
@pytest.mark.kafka
async def test_a_rollout_that_takes_too_long_to_send_stops_no_adapter(kafka_settings):
    """A3: on real Kafka, with a quota of 100 kB/s. An abort has to wait for the requests that are under way."""
    settings = kafka_settings(compression="none")
    log = KafkaLog(settings)
    await log.create_topics()
    bed, tasks = Bed(log, settings.topics), [task() for _ in range(4)]
    attributes = {semconv.REQUEST_MESSAGES: json.dumps("y" * 1_000_000)}
    large = [call(tasks[0], "a", str(n), sequence=n, attributes=attributes) for n in range(4)]
    await write(bed, *attempt(tasks[0], *large))
    reader = Reader(bed, bed.topics.triplets)
    throttle(settings, "--add-config", "producer_byte_rate=100000")
    try:
        async with adapter_on(bed, policy=AdapterPolicy(budget=BudgetPolicy(send_s=2.0, slow_tries=2))):
            await write(bed, *(record for of in tasks[1:] for record in history(of)))
            await reader.until(lambda found: sum(isinstance(v, RolloutEnd) for _, v in found) == len(tasks), 120)
    finally:
        throttle(settings, "--delete-config", "producer_byte_rate")
    ends = {v.rollout_id: v for _, v in reader.found if isinstance(v, RolloutEnd)}
    assert ends[tasks[0].rollout_id].reason.startswith("too_large: its 4,0")
    assert all(ends[of.rollout_id].trainable for of in tasks[1:])


def throttle(settings, *change):
    """Of every client."""
    command = ["java", "-XX:TieredStopAtLevel=1", "-cp", str(resolve_jars() / "*"), "kafka.admin.ConfigCommand"]
    where = ["--bootstrap-server", settings.kafka_bootstrap_servers, "--entity-type", "clients", "--entity-default"]
    subprocess.run([*command, *where, "--alter", *change], check=True, capture_output=True, timeout=60)
