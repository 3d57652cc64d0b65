"""The schema: migrations, retention, roll-ups that stay exact, and the names that others rely on."""

import json
import re
import threading
from uuid import uuid4

import factories
import pytest

from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.migrations import LockPolicy, locked, packaged_migrations
from millstream.consumers.sink.rows import to_rows
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.store.queries import COMPARE_VERSIONS
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.ids import derived_id, new_id
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import Control, RolloutEnd, Worker

EVENTS = "millstream.events"
DAY_NS = 86_400 * 10**9


@pytest.fixture
def settings(folder):
    return load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{uuid4().hex}")


def logged(*values, topic=EVENTS):
    return [LogRecord(Partition(topic, 0), at, 1, None, codec.encode(value)) for at, value in enumerate(values)]


def insert(writer, records):
    tables, unusable = to_rows(records, EVENTS)
    assert not unusable
    for rows in tables:
        rows.insert(writer, new_id())


# --- roll-ups


def run(count):
    """Rollouts of two versions over three minutes: for each a call, a tool, a reward and an end."""
    values = []  # rewards are 64ths: their sums don't depend on the order
    for n in range(count):
        task, at = factories.task(), factories.T0 + n % 3 * 60 * 10**9
        version = f"run.0.{n % 2}"
        values += [
            factories.call(task, "a", str(n), sequence=1, start=at, end=at + n * 10**6, model_version=version),
            factories.span(task, "a", kind="tool", name="add", sequence=2, start=at, end=at + 10**6),
            factories.reward(task, "a", n / 64),
            RolloutEnd(
                rollout_id=task.rollout_id,
                group_id="g",
                group_size=1,
                status="failed" if n % 5 == 0 else "succeeded",
                attempts=1,
                reward=n / 64,
                model_version=version,
                created_at=at,
                started_at=at,
                ended_at=at + n * 10**6,
            ),
        ]
    return logged(*values)


ROLL_UPS = ["rollouts_per_minute", "rewards_per_minute", "tokens_per_minute", "latency_per_minute"]


def rolled_up(store):
    return {view: sorted(store.sql(f"SELECT * FROM {view}").rows, key=str) for view in ROLL_UPS}


def test_roll_ups_stay_exact_when_blocks_come_again_with_other_boundaries(writer, store):
    records = run(60)
    insert(writer, records)
    before = rolled_up(store)
    rewards = store.sql(
        "SELECT model_version, sum(rollouts), sum(rollouts * reward_mean) / sum(rollouts) FROM rewards_per_minute "
        "GROUP BY model_version ORDER BY model_version"
    ).rows
    assert rewards == [("run.0.0", 30, 29 / 64), ("run.0.1", 30, 30 / 64)]
    tokens = store.sql("SELECT sum(calls), sum(prompt_tokens), sum(response_tokens) FROM tokens_per_minute").rows
    assert tokens == [(60, 180, 60)]
    ended = store.sql("SELECT status, sum(rollouts) FROM rollouts_per_minute GROUP BY status ORDER BY status").rows
    assert ended == [("failed", 12), ("succeeded", 48)]
    assert [len(rows) for rows in before.values()] == [6, 6, 6, 7]
    for cut in (17, 90):  # as after a crash: what was not committed comes again, in other blocks
        insert(writer, records[cut : cut + 70])
        insert(writer, records[cut + 31 :])
        assert rolled_up(store) == before
    assert store.sql("SELECT count() FROM spans_raw").rows > [(180,)]  # it is the views that are exact


def test_a_roll_up_of_some_minutes_leaves_the_rest_unread(writer, store):
    at = f"toDateTime64('{2027 + 1}-01-01 00:00:00', 9)"
    insert(writer, run(6))
    for view in ROLL_UPS:
        plan = str(store.sql(f"EXPLAIN indexes = 1 SELECT * FROM {view} WHERE minute >= {at}").rows)
        assert "idx_time" in plan, view
        assert re.findall(r"Granules: (\d+)/", plan)[-1] == "0", view


def test_versions_of_a_model_are_compared_by_the_rollouts_that_each_served(writer, store):
    values = []
    for versions, rewards in ((["m.0.1"], [0, 1, 0, 1, None]), (["m.0.2"], [1, 1, 1]), (["m.0.1", "m.0.2"], [1, 0])):
        for reward in rewards:
            task = factories.task()
            values += [factories.event(task, "a", status.PREPARING, time=factories.T0)]
            for n, version in enumerate(versions):
                said = {"gen_ai.request.model": "policy"}
                values += [factories.call(task, "a", str(n), sequence=n, attributes=said, model_version=version)]
            other = {"gen_ai.request.model": "gpt"}  # not a version of the policy
            values += [factories.call(task, "a", "x", sequence=7, attributes=other, model_version="gpt.0.0")]
            values += [
                RolloutEnd(
                    rollout_id=task.rollout_id,
                    group_id="g",
                    group_size=1,
                    status="failed" if reward is None else "succeeded",
                    attempts=1,
                    reward=reward,
                    created_at=factories.T0,
                    started_at=factories.T0,
                    ended_at=factories.T0 + 1,
                )
            ]
    insert(writer, logged(*values))
    compared = store.sql(COMPARE_VERSIONS, {"model": "policy"}).records()
    assert [(row["model_version"], row["rollouts"], row["failures"]) for row in compared] == [
        ("m.0.1", 5, 1),
        ("m.0.2", 3, 0),
        ("mixed", 2, 0),
    ]
    first, second, _ = compared
    half = 1.96 * (1 / 3) ** 0.5 / 2  # of 0, 1, 0, 1
    assert (first["mean_reward"], first["ci95_low"], first["ci95_high"]) == pytest.approx(
        (0.5, 0.5 - half, 0.5 + half), abs=1e-4
    )
    assert (second["mean_reward"], second["ci95_low"], second["ci95_high"]) == (1, 1, 1)


# --- what others rely on


def test_the_traces_have_the_names_and_types_of_the_collectors_exporter(writer, store):
    text, attributes = "LowCardinality(String)", "Map(LowCardinality(String), String)"
    assert [row[:2] for row in store.sql("DESCRIBE TABLE otel_traces").rows] == [
        ("Timestamp", "DateTime64(9)"),
        ("TraceId", "String"),
        ("SpanId", "String"),
        ("ParentSpanId", "String"),
        ("TraceState", "String"),
        ("SpanName", text),
        ("SpanKind", text),
        ("ServiceName", text),
        ("ResourceAttributes", attributes),
        ("ScopeName", "String"),
        ("ScopeVersion", "String"),
        ("SpanAttributes", attributes),
        ("Duration", "UInt64"),
        ("StatusCode", text),
        ("StatusMessage", "String"),
        ("Events.Timestamp", "Array(DateTime64(9))"),
        ("Events.Name", f"Array({text})"),
        ("Events.Attributes", f"Array({attributes})"),
        ("Links.TraceId", "Array(String)"),
        ("Links.SpanId", "Array(String)"),
        ("Links.TraceState", "Array(String)"),
        ("Links.Attributes", f"Array({attributes})"),
    ]
    assert [row[:2] for row in store.sql("DESCRIBE TABLE otel_traces_trace_id_ts").rows] == [
        ("TraceId", "String"),
        ("Start", "SimpleAggregateFunction(min, DateTime)"),
        ("End", "SimpleAggregateFunction(max, DateTime)"),
    ]
    task = factories.task()
    spans = [factories.span(task, "a", trace_id="t1", sequence=n, start=factories.T0 + n * 10**9) for n in range(3)]
    insert(writer, logged(*spans))
    insert(writer, logged(*spans))
    assert store.sql("SELECT count() FROM otel_traces WHERE TraceId = 't1'").rows == [(3,)]
    assert store.sql("SELECT TraceId, End - Start FROM otel_traces_trace_id_ts").rows == [("t1", 2)]


def test_workers_and_experiments(writer, store):
    worker = Worker(worker_id="w", role="runner", host="h", version="1", slots=4, running=1, started=1, last_seen=5)
    insert(writer, logged(worker, topic="millstream.workers"))
    insert(writer, logged(Worker(**{**vars_of(worker), "running": 2, "last_seen": 9}), topic="millstream.workers"))
    assert store.sql("SELECT worker_id, slots, running, toUnixTimestamp64Nano(last_seen) FROM workers").rows == [
        ("w", 4, 2, 9)
    ]
    body = {"run": "calc", "seed": 3, "algorithm": "Grpo", "settings": {"a": 1}, "millstream": "0.1.0"}
    experiment = Control(kind="experiment", name="e", experiment_id="e", body=json.dumps(body), created_at=1)
    insert(writer, logged(experiment, topic="millstream.control"))
    ((*found, configuration),) = store.sql(
        "SELECT experiment_id, run, algorithm, seed, version, configuration FROM experiments"
    ).rows
    assert (found, json.loads(configuration)) == (["e", "calc", "Grpo", 3, "0.1.0"], body)


def vars_of(record):
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_a_query_for_one_rollout_reads_its_granules_alone(writer, store):
    task = factories.task()
    insert(writer, logged(*[factories.span(task, "a", sequence=n) for n in range(3)]))
    for rollout_id, granules in ((task.rollout_id, "1"), ("0", "0")):
        plan = store.sql("EXPLAIN indexes = 1 SELECT * FROM spans WHERE RolloutId = {r:String}", {"r": rollout_id})
        assert re.findall(r"Granules: (\d+)/", str(plan.rows))[-1] == granules


def test_which_version_made_which_tokens_can_be_queried(settings):
    writer, store = ClickHouseWriter(settings), ClickHouseStore(settings)
    writer.migrate()
    said = ['[[0,"r.0.1"],[2,"r.0.2"],[3,"r.0.3"]]', None, "nonsense", '[[0,"r.0.2"],[1,"r.0.3"]]']
    for turn, text in enumerate(said):
        value = "NULL" if text is None else f"'{text}'"
        writer.client.command(
            "INSERT INTO triplets_raw (rollout_id, turn, response_bytes, response_versions) "
            f"SELECT 'r', {turn}, unhex('{'07000000' * 4}'), {value}"
        )
    parts = "FROM triplets ARRAY JOIN response_versions AS part"
    found = store.sql(f"SELECT turn, part.first_token, part.tokens, part.version {parts} ORDER BY turn, 2")
    first = [(0, 0, 2, "r.0.1"), (0, 2, 1, "r.0.2"), (0, 3, 1, "r.0.3")]
    assert found.rows == [*first, (3, 0, 1, "r.0.2"), (3, 1, 3, "r.0.3")]
    tokens = store.sql(f"SELECT part.version, sum(part.tokens) {parts} GROUP BY 1 ORDER BY 1")
    assert tokens.rows == [("r.0.1", 2), ("r.0.2", 2), ("r.0.3", 4)]
    store.close()
    writer.close()


# --- migrations


def test_a_store_of_the_first_version_keeps_its_rows(settings):
    writer, store = ClickHouseWriter(settings), ClickHouseStore(settings)
    writer.migrate(packaged_migrations()[:1])
    task, attempt = factories.task(), new_id()
    day = "toDate(UUIDv7ToDateTime(toUUID('" + task.rollout_id + "'), 'UTC'))"
    for statement in (
        f"INSERT INTO tasks_raw (date, rollout_id, attempt, input) SELECT {day}, '{task.rollout_id}', 1, 'q'",
        "INSERT INTO attempts_raw (date, rollout_id, attempt_id, status, attempt, offset) "
        f"SELECT {day}, '{task.rollout_id}', '{attempt}', '{status.PREPARING}', 1, 1",
        "INSERT INTO rollout_ends_raw (date, rollout_id, status, reward, offset) "
        f"SELECT {day}, '{task.rollout_id}', 'succeeded', 0.5, 2",
        f"INSERT INTO spans_raw (Date, RolloutId, SpanName, Reward) SELECT {day}, '{task.rollout_id}', 'work', 0.5",
        f"INSERT INTO token_ids_raw (date, rollout_id, prompt_token_ids) SELECT {day}, '{task.rollout_id}', [1, 2]",
        f"INSERT INTO triplets_raw (date, rollout_id, response_bytes) "
        f"SELECT {day}, '{task.rollout_id}', unhex('07000000')",
        "INSERT INTO triplets_raw (date, rollout_id, attempt_id, turn, span_id) "
        f"SELECT {day}, '{task.rollout_id}', '{attempt}', 1, 's'",
        "INSERT INTO spans_raw (Date, RolloutId, AttemptId, SpanId, Kind, PromptTokens, ResponseTokens, Sequence) "
        f"SELECT {day}, '{task.rollout_id}', '{attempt}', 's', 'llm', 12, 3, 1",
        "INSERT INTO controls_raw (kind, name, body) SELECT 'resources', 'v1', '{}'",
        "INSERT INTO workers_raw (worker_id) SELECT 'w'",
        "INSERT INTO dead_letters_raw (source_topic, reason) SELECT 't', 'undecodable'",
    ):
        writer.client.command(statement)
    assert writer.migrate() == [m.name for m in packaged_migrations()[1:]]
    for query, expected in {
        "SELECT status, reward, input FROM rollouts": ("succeeded", 0.5, "q"),
        "SELECT prompt_tokens, response_tokens FROM rollouts": (12, 4),
        "SELECT status, reward, prompt_tokens, response_tokens FROM ended_rollouts": ("succeeded", 0.5, 12, 4),
        "SELECT SpanName FROM spans WHERE Kind != 'llm'": ("work",),
        "SELECT value FROM rewards": (0.5,),
        "SELECT prompt_token_ids FROM token_ids": ([1, 2],),
        "SELECT response_token_ids, response_tokens FROM triplets WHERE turn = 0": ([7], 1),
        "SELECT resources_id FROM resources": ("v1",),
        "SELECT worker_id FROM workers": ("w",),
        "SELECT reason FROM dead_letters": ("undecodable",),
    }.items():
        assert store.sql(query).rows == [expected], query
    store.close()
    writer.close()


def test_processes_that_start_at_once_migrate_once(settings):
    writers = [ClickHouseWriter(settings) for _ in range(4)]
    gate, applied, failed = threading.Barrier(len(writers)), [], []

    def start(writer):
        gate.wait()
        try:
            applied.extend(writer.migrate())
        except StoreError as error:
            failed.append(error)

    threads = [threading.Thread(target=start, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(applied) == [m.name for m in packaged_migrations()]
    ask = writers[0].client.query
    assert ask("SELECT count() FROM migrations").result_rows == [(len(applied),)]
    assert ask("SELECT name FROM system.tables WHERE name LIKE 'migration_lock%'").result_rows == []
    for writer in writers:
        writer.close()


def test_a_lock_is_waited_for_and_that_of_a_dead_process_is_ignored(writer, store):
    entered = threading.Event()

    def migrate():
        with locked(writer.client, LockPolicy(poll_s=0.01)):
            entered.set()

    writer.client.command("CREATE TABLE migration_lock (held UInt8) ENGINE = Memory")
    waiting = threading.Thread(target=migrate)
    waiting.start()
    assert not entered.wait(0.2)
    writer.client.command("DROP TABLE migration_lock")
    waiting.join(10)
    assert entered.is_set()
    writer.client.command("CREATE TABLE migration_lock (held UInt8) ENGINE = Memory")
    with locked(writer.client, LockPolicy(stale_s=-1)):
        pass
    assert store.sql("SELECT name FROM system.tables WHERE name = 'migration_lock'").rows == []


# --- retention


def test_retention_is_what_the_settings_say_now(settings):
    old, new = (factories.task(rollout_id=derived_id(factories.T0 + day * DAY_NS, day)) for day in (-3000, 0))
    undated = factories.task(rollout_id="mine")

    def left(**days):
        writer = ClickHouseWriter(settings.model_copy(update={"retention_days": days}))
        writer.migrate()
        for table in ("spans_raw", "attempts_raw"):
            writer.client.command(f"OPTIMIZE TABLE {table} FINAL")
        found = [row[0] for row in writer.client.query("SELECT RolloutId FROM spans ORDER BY RolloutId").result_rows]
        attempts = writer.client.query("SELECT count() FROM attempts_raw").result_rows[0][0]
        writer.close()
        return found, attempts

    everything = sorted(t.rollout_id for t in (old, new, undated))
    assert left() == ([], 0)
    writer = ClickHouseWriter(settings)
    insert(
        writer,
        logged(*[v for t in (old, new, undated) for v in (factories.span(t, "a"), factories.event(t, "a", "failed"))]),
    )
    assert left() == (everything, 3)
    assert left(spans=10_000) == (everything, 3)
    assert left(spans=1000) == (sorted([new.rollout_id, "mine"]), 3)
    assert left() == (sorted([new.rollout_id, "mine"]), 3)  # and from here on everything stays
    limited = "SELECT count() FROM system.tables WHERE database = currentDatabase() AND engine_full LIKE '%TTL%'"
    assert writer.client.query(limited).result_rows == [(0,)]
    writer.close()


def test_retention_of_a_table_that_there_is_not(monkeypatch):
    monkeypatch.setenv("MILLSTREAM_RETENTION_DAYS", '{"spanz": 3}')
    with pytest.raises(ConfigError, match=r"retention_days.*spanz"):
        load_settings()
    monkeypatch.setenv("MILLSTREAM_RETENTION_DAYS", "30 days")
    with pytest.raises(ConfigError, match="retention_days"):
        load_settings()
    monkeypatch.setenv("MILLSTREAM_RETENTION_DAYS", '{"spans": 3, "dead_letters": 7}')
    assert load_settings().retention_days == {"spans": 3, "dead_letters": 7}
