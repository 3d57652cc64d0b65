"""What a `Store` promises, on the embedded engine and over HTTP."""

import asyncio
import io
import struct
from dataclasses import replace
from typing import get_args
from uuid import uuid4

import factories
import pytest

import millstream as ms
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.clickhouse import ClickHouseSink
from millstream.pipeline.store.read_server import serving_queries
from millstream.pipeline.store.results import RolloutOrder
from millstream.schemas.errors import StoreError
from millstream.schemas.ids import derived_id, new_id
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import RolloutEnd, SpanEvent, SpanLink, Triplet
from millstream.schemas.wire.topics import Topics, partition_of
from millstream.schemas.wire.versions import to_text

TOPICS = Topics(partitions=2)
T0 = factories.T0


@pytest.fixture
def log():
    return MemoryLog(TOPICS)


@pytest.fixture
def settings(folder):
    return ms.load_settings(
        clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{uuid4().hex}", kafka_partitions=TOPICS.partitions
    )


@pytest.fixture
def store(settings, writer, log):
    opened = ms.ClickHouseStore(settings, log)
    yield opened
    opened.close()


@pytest.fixture
def server(settings, writer):
    """The same database, read over HTTP."""
    with serving_queries(settings, "127.0.0.1", 0) as port:
        opened = ms.ClickHouseStore(settings.model_copy(update={"clickhouse_dsn": f"clickhouse://127.0.0.1:{port}"}))
        yield opened
        opened.close()


@pytest.fixture(params=["store", "server"])
def sql_store(request):
    return request.getfixturevalue(request.param)


class Pipe:
    """Writes records to the log, and moves them from there into the store."""

    def __init__(self, log, writer):
        self.log, self.writer = log, writer
        self.producer = log.producer()
        self.consumer = None

    async def write(self, *values, topic=TOPICS.events):
        for value in values:
            partition = partition_of(value.rollout_id, TOPICS.partitions) if hasattr(value, "rollout_id") else 0
            key = getattr(value, "rollout_id", None)
            self.producer.send(topic, value, key=key, partition=partition)

    async def sink(self):
        """Everything that has not been moved yet."""
        if self.consumer is None:
            self.consumer = self.log.consumer()
            names = [TOPICS.events, TOPICS.triplets, TOPICS.control, TOPICS.tasks("normal")]
            await self.consumer.assign([p for p in map_partitions(self.log) if p.topic in names])
        records = []
        while batch := await self.consumer.poll(1000, 0.05):
            records += batch
        put(self.writer, records)

    async def write_and_sink(self, *values, topic=TOPICS.events):
        await self.write(*values, topic=topic)
        await self.sink()


def map_partitions(log):
    return [Partition(topic, number) for topic, parts in log.partitions.items() for number in range(len(parts))]


def put(writer, records):
    """Twice: what comes again must not be seen."""
    sink = ClickHouseSink(writer, TOPICS.events)
    for _ in range(2):
        assert sink.write(ms.Batch(records, new_id())) == []


@pytest.fixture
async def pipe(log, writer):
    made = Pipe(log, writer)
    yield made
    if made.consumer is not None:
        await made.consumer.close()


def end(task, state="succeeded", attempt_id=None, **fields):
    defaults = {"group_id": task.group_id, "group_size": task.group_size, "experiment_id": task.experiment_id}
    defaults |= {"status": state, "attempt_id": attempt_id, "attempts": 1, "mode": task.mode}
    return RolloutEnd(
        rollout_id=task.rollout_id, created_at=task.created_at, **{**defaults, "ended_at": T0 + 3 * 10**9, **fields}
    )


def triplet(task, turn, **fields):
    defaults = {"experiment_id": task.experiment_id, "span_id": f"{turn:016d}", "prompt": "[]", "response": "{}"}
    return Triplet(
        rollout_id=task.rollout_id, attempt_id="a", group_id=task.group_id, turn=turn, **{**defaults, **fields}
    )


# --- rollouts and attempts


async def test_a_rollout_from_its_publication_to_its_end(store, pipe):
    task = factories.task(group_id="g", experiment_id="e", metadata={"k": "v"}, input='{"n": 1}', max_attempts=2)
    assert store.rollouts() == []
    await pipe.write_and_sink(task, topic=TOPICS.tasks("normal"))
    (queued,) = store.rollouts()
    assert (queued.status, queued.input, queued.metadata, queued.created_at) == ("queued", '{"n": 1}', {"k": "v"}, T0)
    assert (queued.started_at, queued.ended_at, queued.queued_s, queued.reward, queued.trainable) == (None,) * 5

    await pipe.write_and_sink(
        factories.event(task, "a", status.PREPARING, time=T0 + 10**9), factories.event(task, "a", status.RUNNING)
    )
    (running,) = store.rollouts()
    assert (running.status, running.attempts, running.queued_s) == ("running", 1, 1.0)

    await pipe.write_and_sink(
        factories.event(task, "a", status.FAILED, time=T0 + 2 * 10**9, span_counts={"agent": 3}),
        factories.event(task, "a", status.RETRY),
    )
    (retrying,) = store.rollouts()
    assert (retrying.status, retrying.error_type, retrying.error_message) == ("retrying", "ValueError", "no")

    second = factories.task(rollout_id=task.rollout_id, group_id="g", experiment_id="e", attempt=2)
    await pipe.write_and_sink(
        factories.event(second, "b", status.PREPARING, time=T0 + 2 * 10**9),
        factories.event(second, "b", status.SUCCEEDED, time=T0 + 3 * 10**9, output='"done"'),
        end(task, attempt_id="b", attempts=2, turns=2, spans=5, reward=0.5, model_version="run.0.1"),
    )
    (done,) = store.rollouts()
    assert (done.status, done.attempts, done.turns, done.spans, done.reward) == ("succeeded", 2, 2, 5, 0.5)
    assert (done.output, done.error_message, done.trainable, done.duration_s) == ('"done"', "", True, 2.0)
    first, last = store.attempts(task.rollout_id)
    assert (first.attempt, first.status, first.error_type, first.span_counts) == (
        1,
        "failed",
        "ValueError",
        {"agent": 3},
    )
    assert (last.attempt_id, last.status, last.output, last.ended_at) == ("b", "succeeded", '"done"', T0 + 3 * 10**9)
    assert store.attempts(new_id()) == []


@pytest.fixture
async def several(pipe):
    """Six tasks: the first four ended with rewards 0, 3, 2, 1; the last two are queued."""
    tasks = [
        factories.task(
            rollout_id=derived_id(T0 + n * 10**6, n),
            group_id=f"g{n // 3}",
            experiment_id=f"e{n % 2}",
            created_at=T0 + n,
        )
        for n in range(6)
    ]
    await pipe.write(*tasks, topic=TOPICS.tasks("normal"))
    rewards = [0.0, 3.0, 2.0, 1.0]
    await pipe.write_and_sink(
        *[
            end(task, "failed" if n == 0 else "succeeded", reward=rewards[n], model_version=f"run.0.{n % 2}")
            for n, task in enumerate(tasks[:4])
        ]
    )
    return [task.rollout_id for task in tasks]


def ids(rollouts):
    return [rollout.rollout_id for rollout in rollouts]


async def test_filters_hold_together(store, several):
    assert ids(store.rollouts()) == several[::-1]
    assert ids(store.rollouts(status="succeeded", experiment_id="e1")) == [several[3], several[1]]
    assert ids(store.rollouts(group_id="g1", status="queued")) == several[:3:-1]
    assert ids(store.rollouts(model_version="run.0.0")) == [several[2], several[0]]
    assert ids(store.rollouts([several[1], several[4], new_id()])) == [several[4], several[1]]
    assert store.rollouts([]) == []
    assert store.rollouts(mode="val") == []
    assert store.rollouts(status="' OR 1 = 1 --") == []
    with pytest.raises(TypeError, match="unknown filter 'experiment'"):
        store.rollouts(experiment="e1")


async def test_sorting_puts_what_is_missing_last(store, several):
    by_reward = [several[n] for n in (1, 2, 3, 0)]
    assert ids(store.rollouts(sort_by="reward")) == [*by_reward, several[5], several[4]]
    assert ids(store.rollouts(sort_by="reward", descending=False)) == [*by_reward[::-1], several[4], several[5]]
    assert ids(store.rollouts(sort_by="reward", limit=2, offset=1)) == by_reward[1:3]
    assert store.rollouts(limit=0) == []
    with pytest.raises(ValueError, match="can't be sorted by 'reward; DROP'"):
        store.rollouts(sort_by="reward; DROP")


# --- spans, triplets, rewards, resources


async def test_spans_come_back_as_they_were_written(store, pipe):
    task = factories.task()
    whole = factories.call(
        task,
        "a",
        "r",
        sequence=2,
        start=T0 + 123,
        end=T0 + 4_567,
        events=(SpanEvent(name="retry", time=T0 + 200, attributes={"n": "1"}),),
        links=(SpanLink(trace_id="c" * 32, span_id="d" * 16, attributes={"why": "cause"}),),
        resource={"service.name": "calculator"},
        response_token_ids=b"",
        response_logprobs=struct.pack("<2f", -0.1, float("-inf")),
    )
    spans = [factories.span(task, "a", sequence=9), whole, factories.reward(task, "b", 0.5)]
    await pipe.write_and_sink(*spans, factories.span(factories.task(), "a"))
    assert store.spans(task.rollout_id) == spans
    assert store.spans(task.rollout_id, attempt_id="b") == spans[2:]
    assert store.spans(new_id()) == []


async def test_triplets_by_what_they_are(store, pipe):
    one = factories.task(rollout_id=derived_id(T0, 1), experiment_id="e", group_id="g")
    two = factories.task(rollout_id=derived_id(T0 + 10**6, 2))
    tokens = {"prompt_token_ids": struct.pack("<2i", 1, 2), "response_token_ids": struct.pack("<i", 3)}
    written = [
        triplet(one, 0, **tokens, response_logprobs=struct.pack("<f", -0.25), reward=1.0, model_version="v"),
        triplet(one, 1, trainable=False, reason="no token ids", metadata={"a": "b"}),
        triplet(two, 0, reward=-1.0, model_version="mixed", response_versions=to_text(((0, "r.0.1"), (3, "r/ü.0.2")))),
    ]
    await pipe.write_and_sink(*written[::-1], topic=TOPICS.triplets)
    assert store.triplets() == written
    assert store.triplets([two.rollout_id]) == written[2:]
    assert store.triplets(experiment_id="e", trainable=True) == written[:1]
    assert store.triplets(trainable=False) == written[1:2]
    assert store.triplets(model_version="v") == store.triplets(group_id="g", limit=1) == written[:1]


async def test_rewards_of_every_attempt(store, pipe):
    task = factories.task()
    named = factories.span(task, "b", sequence=2, reward=-1.0, reward_name="style", start=T0 + 7)
    await pipe.write_and_sink(factories.reward(task, "a", 0.5), factories.span(task, "a", sequence=3), named)
    assert [(r.attempt_id, r.name, r.value) for r in store.rewards()] == [("a", "reward", 0.5), ("b", "style", -1.0)]
    (found,) = store.rewards([task.rollout_id], name="style")
    assert (found.time, found.span_id, found.source) == (T0 + 7, named.span_id, semconv.SOURCE_AGENT)
    assert store.rewards([new_id()]) == []


async def test_the_latest_resources(store, pipe):
    assert store.latest_resources() is None
    versions = [
        ms.Resources(
            resources_id=derived_id(T0 + n * 10**6, n),
            experiment_id=f"e{n % 2}",
            items={"llm": ms.LLM(model="m", model_version=f"run.0.{n}"), "limits": {"n": n}},
        )
        for n in range(3)
    ]
    await pipe.write_and_sink(*[v.to_control(T0) for v in versions[::-1]], topic=TOPICS.control)
    assert store.latest_resources() == versions[2]
    assert store.latest_resources("e1") == versions[1]
    assert store.latest_resources("e2") is None


# --- waiting


async def test_waiting_for_ends(store, pipe, several):
    ended = store.wait_for([several[2], several[0]], timeout_s=0)
    assert ids(ended) == [several[2], several[0]]
    with pytest.raises(TimeoutError, match=f"1 of 2 rollouts have not ended after 0 s, {several[5]} among them"):
        store.wait_for([several[0], several[5]], timeout_s=0)
    with pytest.raises(TimeoutError):
        store.wait_for([several[5]], timeout_s=0.01)
    waiting = asyncio.create_task(asyncio.to_thread(store.wait_for, [several[5], several[0]], timeout_s=30))
    (task,) = (r for r in store.rollouts() if r.rollout_id == several[5])
    await pipe.write_and_sink(end(factories.task(rollout_id=task.rollout_id, created_at=task.created_at), "cancelled"))
    assert [r.status for r in await waiting] == ["cancelled", "failed"]


async def test_following_a_rollout_that_is_nowhere_yet(store, pipe):
    before, task, other = factories.task(), factories.task(), factories.task()
    await pipe.write_and_sink(factories.event(before, "a", status.PREPARING))
    followed = store.follow(task.rollout_id)
    first = asyncio.create_task(anext(followed))
    spans = [factories.span(task, "a", sequence=n) for n in range(3)]
    await pipe.write(factories.event(task, "a", status.PREPARING), factories.span(other, "a"), spans[0])
    assert await asyncio.wait_for(first, 10) == spans[0]
    await pipe.write_and_sink(spans[1])
    assert await asyncio.wait_for(anext(followed), 10) == spans[1]
    await pipe.write(spans[2], end(task), factories.span(task, "a", sequence=9))
    assert [span async for span in followed] == spans[2:]


async def test_following_what_has_ended_is_complete(store, pipe):
    task = factories.task()
    spans = [factories.span(task, "a", sequence=n) for n in range(3)]
    await pipe.write_and_sink(factories.event(task, "a", status.PREPARING), *spans, end(task))
    assert [span async for span in store.follow(task.rollout_id)] == spans


class Forgetful:
    """A log whose retention has taken everything below an offset."""

    def __init__(self, log, beginning):
        self.log, self.beginning = log, beginning

    def consumer(self):
        consumer = self.log.consumer()
        beginning = self.beginning

        async def offsets_since(partitions, time_ms):
            ends = await consumer.end_offsets(partitions)
            return {partition: min(beginning, end) for partition, end in ends.items()}

        consumer.offsets_since = offsets_since
        return consumer


@pytest.mark.parametrize("beginning", [2, 3, 6])
async def test_what_retention_has_taken_comes_from_the_store(store, pipe, log, beginning):
    task = factories.task()
    spans = [factories.span(task, "a", sequence=n) for n in range(3)]
    await pipe.write_and_sink(factories.event(task, "a", status.PREPARING), *spans, end(task))
    store._log = Forgetful(log, beginning)
    found = await asyncio.wait_for(_all(store.follow(task.rollout_id)), 10)
    assert found == spans


async def _all(spans):
    return [span async for span in spans]


# --- SQL


def test_sql_as_records_arrow_and_pandas(sql_store):
    query = "SELECT {a:String} AS a, number AS n FROM numbers({n:UInt64}) ORDER BY n"
    hostile = "x'; DROP TABLE tasks_raw --\n{n:UInt64}"
    expected = [{"a": hostile, "n": n} for n in range(3)]
    assert sql_store.sql(query, {"a": hostile, "n": 3}).records() == expected
    assert sql_store.sql_arrow(query, {"a": hostile, "n": 3}).to_pylist() == expected
    assert sql_store.sql_df(query, {"a": hostile, "n": 3}).to_dict("records") == expected
    assert list(sql_store.sql_df("SELECT rollout_id, reward FROM rollouts;").columns) == ["rollout_id", "reward"]


async def test_threads_share_a_store(sql_store):
    asked = [asyncio.to_thread(sql_store.sql, "SELECT {n:Int32} AS n", {"n": n}) for n in range(20)]
    assert [answer.rows for answer in await asyncio.gather(*asked)] == [[(n,)] for n in range(20)]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 INTO OUTFILE '{file}'",
        "SELECT * FROM (SELECT 1) UNION ALL SELECT 2 INTO OUTFILE '{file}'",
        "EXPLAIN AST SELECT 1 INTO OUTFILE '{file}'",
        "INSERT INTO FUNCTION file('{file}', 'CSV', 'a Int8') SELECT 1",
        "SELECT 1; SELECT 2 INTO OUTFILE '{file}'",
        "SELECT 1) FORMAT Native; SELECT 2 INTO OUTFILE '{file}' --",
        "CREATE TEMPORARY TABLE t (a Int8)",
        "KILL QUERY WHERE 1",
        "USE default",
        "/* SELECT */ USE default",
        "",
    ],
)
def test_what_readonly_alone_would_let_through(sql_store, tmp_path, query):
    file = tmp_path / "out"
    for ask in (sql_store.sql, sql_store.sql_arrow, sql_store.sql_df):
        with pytest.raises(StoreError):
            ask(query.replace("{file}", str(file)))
    assert not file.exists()
    assert sql_store.sql("SELECT count() FROM rollouts").rows == [(0,)]  # still in its own database


def test_a_server_answers_as_the_engine_does(server, store, writer):
    tasks = [factories.task(rollout_id=derived_id(T0 + n * 10**6, n), group_id=g) for n, g in enumerate(["it's", "h"])]
    records = [
        LogRecord(
            Partition(TOPICS.events, 0), n, 1, None, codec.encode(factories.event(task, f"a{n}", status.PREPARING))
        )
        for n, task in enumerate(tasks)
    ]
    put(writer, records)
    every = store.rollouts()
    assert ids(every) == [task.rollout_id for task in tasks[::-1]]
    assert server.rollouts() == every
    assert server.rollouts([tasks[0].rollout_id, "' OR 1"]) == server.rollouts(group_id="it's") == every[1:]
    assert server.attempts(tasks[1].rollout_id) == store.attempts(tasks[1].rollout_id)
    many = [tasks[0].rollout_id, *(new_id() for _ in range(2000))]  # too many for a URL
    assert server.rollouts(many) == every[1:]
    file = io.BytesIO()
    server.export("SELECT group_id FROM rollouts WHERE group_id = {g:String}", file, "CSVWithNames", {"g": "it's"})
    assert file.getvalue() == b'"group_id"\n"it\'s"\n'


async def test_a_page_of_rollouts_is_that_part_of_all(store, pipe):
    """Whichever table tells which rollouts are on it."""
    for n in range(24):
        task = factories.task(mode="val" if n % 3 == 0 else "train", created_at=T0 + n % 5)
        await pipe.write(task, topic=TOPICS.tasks("normal"))
        if n % 6 == 0:
            continue
        attempt = new_id()
        await pipe.write(factories.event(task, attempt, status.PREPARING, time=T0 + 10 * n))
        if n % 6 == 3:  # retried
            retry = replace(task, attempt=2, created_at=T0 + n)
            await pipe.write(retry, topic=TOPICS.tasks("normal"))
            attempt = new_id()
            await pipe.write(factories.event(retry, attempt, status.PREPARING, time=T0 + 1000 - 30 * n))
        if n % 6 == 1:
            continue
        state = "failed" if n % 6 == 2 else "succeeded"
        rest = {} if state == "failed" else {"reward": n % 4 / 2, "turns": n % 3, "model_version": f"v{n % 2}"}
        await pipe.write(end(task, state, attempt, ended_at=T0 + 10**9 + n % 7, **rest))
    await pipe.sink()
    for filters in ({}, {"status": "failed"}, {"status": "running"}, {"model_version": "v1"}):
        for n, sort_by in enumerate(get_args(RolloutOrder)):
            order = {"sort_by": sort_by, "descending": n % 2 == 0}
            whole = [r.rollout_id for r in store.rollouts(**order, **filters)]
            assert whole
            for limit, offset in ((3, 1),) if filters else ((3, 1), (4, 14)):
                page = [r.rollout_id for r in store.rollouts(**order, limit=limit, offset=offset, **filters)]
                assert page == whole[offset : offset + limit], (filters, sort_by, limit, offset)
