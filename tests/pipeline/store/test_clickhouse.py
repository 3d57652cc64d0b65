import random
from collections import Counter
from functools import partial
from uuid import uuid4

import factories
import pytest

from examples.calculator.demo import CLOSING_QUERIES
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.consumers.sink.rows import to_rows
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.schemas.config.settings import load_settings
from millstream.schemas.control import LLM, PromptTemplate, Resources
from millstream.schemas.errors import StoreError
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd, SpanEvent, SpanLink, Triplet

EVENTS = "millstream.events"


@pytest.fixture
def settings(folder):
    return load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{uuid4().hex}")


class Writer:
    """Writes records as if they lay on one partition, in the order given."""

    def __init__(self, writer):
        self.writer = writer
        self.offset = 0

    def __call__(self, *values, topic=EVENTS):
        records = []
        for value in values:
            records.append(LogRecord(Partition(topic, 0), self.offset, 1, None, codec.encode(value)))
            self.offset += 1
        self.insert(records)
        return records

    def insert(self, records, token=None):
        tables, unusable = to_rows(records, EVENTS)
        assert not unusable
        for rows in tables:
            rows.insert(self.writer, token or new_id())


@pytest.fixture
def write(writer):
    return Writer(writer)


def end(of, state, attempt_id=None, **fields):
    defaults = {
        "rollout_id": of.rollout_id,
        "group_id": of.group_id,
        "group_size": of.group_size,
        "status": state,
        "attempt_id": attempt_id,
        "attempts": of.attempt,
        "created_at": of.created_at,
        "ended_at": factories.T0 + 10**9,
    }
    return RolloutEnd(**{**defaults, **fields})


def one(store, sql, **parameters):
    result = store.sql(sql, parameters)
    assert len(result.rows) == 1, result
    return dict(zip(result.columns, result.rows[0], strict=True))


# --- opening


def test_asking_before_anything_was_written(settings):
    store = ClickHouseStore(settings)
    with pytest.raises(StoreError, match=r"no database d\w+ yet: a training run or `millstream sink` creates it"):
        store.sql("SELECT 1")
    writer = ClickHouseWriter(settings)
    writer.migrate()
    assert store.sql("SELECT count() FROM rollouts").rows == [(0,)]
    store.close()
    writer.close()


def test_two_deployments_share_a_store(store, settings):
    other = settings.model_copy(update={"clickhouse_database": f"{settings.clickhouse_database}_2"})
    writer = ClickHouseWriter(other)
    writer.migrate()
    Writer(writer)(factories.task())
    second = ClickHouseStore(other)
    assert second.sql("SELECT count() FROM tasks").rows == [(1,)]
    assert store.sql("SELECT count() FROM tasks").rows == [(0,)]
    second.close()
    writer.close()


# --- asking


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO tasks_raw (rollout_id) VALUES ('x')",
        "DROP TABLE tasks_raw",
        "ALTER TABLE tasks_raw DELETE WHERE 1",
        "CREATE TABLE other (a Int8) ENGINE = Memory",
        "SET readonly = 0",
        "SELECT 1 SETTINGS readonly = 0",
    ],
)
def test_a_query_changes_nothing(store, sql):
    with pytest.raises(StoreError, match="readonly"):
        store.sql(sql)
    assert store.sql("SELECT count() FROM tasks_raw").rows == [(0,)]


def test_a_result_has_its_columns_even_when_it_has_no_rows(store):
    assert store.sql("SELECT rollout_id, reward AS r FROM rollouts;").columns == ("rollout_id", "r")
    result = store.sql("SELECT {a:String} AS a, {b:Int32} + 1 AS b", {"a": "it's", "b": 2})
    assert (result.columns, result.rows) == (("a", "b"), [("it's", 3)])
    assert store.sql("SELECT {a:String} AS a WHERE 0", {"a": "x"}).columns == ("a",)


def test_an_error_is_one_readable_line(store):
    with pytest.raises(StoreError) as caught:
        store.sql("SELECT nothing FROM rollouts")
    assert "nothing" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- exactness


def test_a_batch_that_is_sent_twice_counts_once(store, write):
    task = factories.task()
    attempt = new_id()
    records = write(
        task,
        factories.event(task, attempt, status.PREPARING),
        *[factories.reward(task, attempt, 0.5) for _ in range(3)],
        factories.event(task, attempt, status.SUCCEEDED),
        end(task, "succeeded", attempt, reward=1.5),
    )

    def counts():
        return {
            view: store.sql(f"SELECT count() FROM {view}").rows[0][0]
            for view in ("tasks", "attempts", "rollouts", "spans", "rewards")
        }

    expected = {"tasks": 1, "attempts": 1, "rollouts": 1, "spans": 3, "rewards": 3}
    assert counts() == expected
    write.insert(records)
    write.insert(records[2:4])
    assert counts() == expected
    assert one(store, "SELECT sum(value) AS s FROM rewards")["s"] == 1.5


def test_heartbeats_do_not_grow_the_table(store, write):
    task, attempt = factories.task(), new_id()
    write(factories.event(task, attempt, status.PREPARING))
    for beat in range(20):
        write(factories.event(task, attempt, status.RUNNING, time=factories.T0 + beat))
    assert store.sql("SELECT count() FROM attempts_raw FINAL").rows == [(2,)]
    write.writer.client.command("OPTIMIZE TABLE attempts_raw FINAL")
    assert store.sql("SELECT count() FROM attempts_raw").rows == [(2,)]
    assert store.sql("SELECT toUnixTimestamp64Nano(last_seen) FROM attempts").rows == [(factories.T0 + 19,)]


# --- what the views say


def test_a_span_keeps_all_that_opentelemetry_knows_of_it(store, write):
    task = factories.task()
    span = factories.call(
        task,
        "a",
        "r1",
        start=1_000,
        end=4_500,
        parent_id="b" * 16,
        trace_state="x=1",
        status="Error",
        status_message="boom",
        events=(SpanEvent(name="retry", time=2_000, attributes={"n": "1"}),),
        links=(SpanLink(trace_id="c" * 32, span_id="d" * 16, attributes={"why": "cause"}),),
        resource={"service.name": "calculator"},
        scope_name="openai",
        scope_version="3",
    )
    write(factories.task(), span)
    row = one(
        store,
        "SELECT *, toUnixTimestamp64Nano(Timestamp) AS start, "
        "arrayMap(t -> toUnixTimestamp64Nano(t), `Events.Timestamp`) AS event_times FROM spans",
    )
    expected = {
        "start": 1_000,
        "Duration": 3_500,
        "TraceId": span.trace_id,
        "ParentSpanId": "b" * 16,
        "TraceState": "x=1",
        "ServiceName": "calculator",
        "ScopeName": "openai",
        "StatusCode": "Error",
        "StatusMessage": "boom",
        "event_times": [2_000],
        "Events.Name": ["retry"],
        "Events.Attributes": [{"n": "1"}],
        "Links.TraceId": ["c" * 32],
        "Links.SpanId": ["d" * 16],
        "Links.TraceState": [""],
        "Links.Attributes": [{"why": "cause"}],
        "SpanAttributes": span.attributes,
        "PromptTokens": 3,
        "ResponseTokens": 1,
        "ModelVersion": "run.0.1",
        "Topic": EVENTS,
        "Partition": 0,
        "Offset": 1,
    }
    assert {name: row[name] for name in expected} == expected
    tokens = one(store, "SELECT * FROM token_ids")
    assert (tokens["rollout_id"], tokens["span_id"], tokens["offset"]) == (task.rollout_id, span.span_id, 1)
    assert (tokens["prompt_token_ids"], tokens["response_token_ids"], tokens["response_logprobs"]) == (
        [1, 2, 3],
        [7],
        [-0.5],
    )


def test_tokens_are_counted_or_taken_from_the_provider(store, write):
    task = factories.task()
    usage = {"gen_ai.usage.input_tokens": "12", "gen_ai.usage.output_tokens": "many"}
    most = {"gen_ai.usage.input_tokens": str(1 << 40)}
    none = {"prompt_token_ids": None, "response_token_ids": None}
    write(
        factories.call(task, "a", "1", sequence=1, attributes=usage, response_logprobs=None, **none),
        factories.call(task, "a", "2", sequence=2, attributes=usage, response_token_ids=b""),
        factories.call(task, "a", "3", sequence=3, attributes=most, **none),
    )
    found = store.sql("SELECT PromptTokens, ResponseTokens FROM spans ORDER BY Sequence").rows
    assert found == [(12, 0), (3, 0), ((1 << 32) - 1, 0)]
    given = store.sql("SELECT sequence, has_prompt, has_response, has_logprobs FROM token_ids ORDER BY sequence").rows
    assert given == [(2, True, True, True), (3, False, False, True)]


@pytest.mark.parametrize(
    "rollout_id", ["not-a-uuid", "", "ffffffff-ffff-7fff-bfff-ffffffffffff", "ba0cd586-c5e4-4146-8d76-6361bc67828a"]
)
def test_a_span_of_an_id_without_a_usable_date_meets_its_twin(store, write, rollout_id):
    span = factories.call(factories.task(), "a", "r", rollout_id=rollout_id)
    write(span, span)
    assert store.sql("SELECT RolloutId, count() FROM spans GROUP BY 1").rows == [(rollout_id, 1)]
    assert store.sql("SELECT rollout_id, count() FROM token_ids GROUP BY 1").rows == [(rollout_id, 1)]


def test_a_rollout_from_its_task_to_its_end(store, write):
    task = factories.task(experiment_id="e1", mode="val", priority="high", metadata={"k": "v"}, input='{"q": 1}')
    attempt = new_id()

    def rollout():
        return one(store, "SELECT * FROM rollouts WHERE rollout_id = {r:String}", r=task.rollout_id)

    write(task, topic="millstream.tasks.high")
    queued = rollout()
    assert (queued["status"], queued["attempts"], queued["reward"], queued["trainable"]) == ("queued", 0, None, None)
    assert (queued["experiment_id"], queued["mode"], queued["priority"]) == ("e1", "val", "high")
    assert (queued["input"], queued["metadata"], queued["started_at"]) == ('{"q": 1}', {"k": "v"}, None)

    write(factories.event(task, attempt, status.PREPARING, time=task.created_at + 2 * 10**9))
    running = rollout()
    assert (running["status"], running["attempts"], running["queued_s"]) == ("running", 1, 2.0)

    write(
        factories.event(task, attempt, status.SUCCEEDED, output="42"),
        end(
            task,
            "succeeded",
            attempt,
            reward=0.5,
            turns=1,
            prompt_tokens=2,
            response_tokens=1,
            model_version="run.0.3",
            started_at=task.created_at,
            ended_at=task.created_at + 5 * 10**9,
        ),
    )
    triplet = Triplet(
        rollout_id=task.rollout_id,
        attempt_id=attempt,
        group_id=task.group_id,
        turn=0,
        span_id="s",
        prompt="[]",
        response="{}",
        prompt_token_ids=b"\x01\x00\x00\x00\xff\xff\xff\xff",
        response_token_ids=b"\x07\x00\x00\x00",
        response_logprobs=b"\x00\x00\x00\xbf",
        reward=0.5,
    )
    write(triplet, topic="millstream.triplets")
    ended = rollout()
    assert (ended["status"], ended["reward"], ended["model_version"]) == ("succeeded", 0.5, "run.0.3")
    assert (ended["turns"], ended["trainable"], ended["output"], ended["duration_s"]) == (1, True, "42", 3.0)
    assert (ended["prompt_tokens"], ended["response_tokens"]) == (2, 1)
    found = one(store, "SELECT prompt_token_ids, response_token_ids, response_logprobs FROM triplets")
    assert list(found.values()) == [[1, -1], [7], [-0.5]]


def test_a_failed_rollout_says_why(store, write):
    task, attempt = factories.task(), new_id()
    write(
        task,
        factories.event(task, attempt, status.PREPARING),
        factories.event(task, attempt, status.FAILED),
        end(task, "failed", attempt, reason="failed: ValueError: no", trainable=False),
    )
    row = one(store, "SELECT status, error_type, error_message, reason, trainable FROM rollouts")
    assert list(row.values()) == ["failed", "ValueError", "no", "failed: ValueError: no", False]


def test_a_claim_has_what_the_publisher_did_not_know(store, write):
    task = factories.task()
    write(factories.event(factories.task(rollout_id=task.rollout_id, resources_id="v2"), new_id(), status.PREPARING))
    write(task, topic="millstream.tasks.normal")  # read later
    assert store.sql("SELECT resources_id FROM tasks").rows == [("v2",)]
    assert store.sql("SELECT resources_id FROM rollouts").rows == [("v2",)]


def test_rewards_and_tools(store, write):
    task = factories.task()
    tool = {"gen_ai.tool.name": "add", "gen_ai.tool.call.arguments": "[1, 2]", "gen_ai.tool.call.result": "3"}
    write(
        factories.reward(task, "a", 0.5),
        factories.reward(task, "a", 0.0),
        factories.span(task, "a", kind="tool", attributes=tool, start=0, end=2_000_000),
        factories.span(task, "a", kind="tool", name="divide", status="Error", status_message="by zero"),
        factories.span(task, "a", kind="tool", name="what", attributes={"error.type": "unknown_tool"}),
    )
    assert store.sql("SELECT name, value FROM rewards ORDER BY value").rows == [("reward", 0.0), ("reward", 0.5)]
    calls = "SELECT name, succeeded, arguments, result, error_message FROM tool_calls ORDER BY name"
    assert store.sql(calls).rows == [
        ("add", True, "[1, 2]", "3", ""),
        ("divide", False, "", "", "by zero"),
        ("what", False, "", "", "unknown_tool"),
    ]
    assert store.sql("SELECT duration_s FROM tool_calls WHERE name = 'add'").rows == [(0.002,)]


def test_resources_by_version(store, write):
    items = {"prompt": PromptTemplate(template="{q}"), "main": LLM(model="m", model_version="run.0.4"), "n": {"a": 1}}
    version = Resources(resources_id=new_id(), experiment_id="e", items=items)
    write(version.to_control(created_at=5), topic="millstream.control")
    row = one(store, "SELECT resources_id, experiment_id, model_version, mapKeys(items) AS names FROM resources")
    assert list(row.values()) == [version.resources_id, "e", "run.0.4", ["prompt", "main", "n"]]


def test_the_closing_queries_answer(store, write):
    for n in range(3):
        task, attempt = factories.task(created_at=factories.T0 + n), new_id()
        write(
            task,
            factories.event(task, attempt, status.PREPARING),
            factories.span(task, attempt, kind="tool", name="add"),
            factories.event(task, attempt, status.SUCCEEDED),
            end(task, "succeeded", attempt, reward=float(n == 2), turns=2, model_version=f"run.0.{n // 2}"),
        )
    by_version, slowest, tools = (store.sql(sql) for sql in CLOSING_QUERIES.values())
    assert by_version.columns[:3] == ("model_version", "rollouts", "mean_reward")
    assert [row[:3] for row in by_version.rows] == [("run.0.0", 2, 0.0), ("run.0.1", 1, 1.0)]
    assert len(slowest.rows) == 3
    assert tools.rows[0][:3] == ("add", True, 3)


# --- statuses, at every moment of many histories


def history(random):
    """One rollout's events as valid writers write them: retries, lost leases, zombies that write late."""
    task = factories.task(max_attempts=3)
    events = []
    late = []
    for number in range(1, random.randint(1, 3) + 1):
        attempt = new_id()

        event = partial(factories.event, task, attempt, attempt=number)

        events.append(event(status.PREPARING))
        events += [event(status.RUNNING) for _ in range(random.randint(0, 3))]
        how = random.choice([*sorted(status.TERMINAL), None])  # None: its lease runs out
        if how is not None:
            events.append(event(how))
        late.append([event(random.choice([status.RUNNING, status.SUCCEEDED, status.FAILED])) for _ in range(3)])
        if how in (status.SUCCEEDED, status.CANCELLED):
            break
        events.append(event(status.RETRY))
        if random.random() < 0.4:
            events += late[-1]
        if random.random() < 0.2:  # its task was delivered twice
            events.append(factories.event(task, new_id(), status.PREPARING, attempt=number))
    if random.random() < 0.7:
        if events[-1].status == status.RETRY:
            events.pop()
        events.append(end(task, random.choice(["succeeded", "failed", "cancelled"])))
        events += [e for zombie in late if random.random() < 0.5 for e in zombie]
    return task, events[: random.randint(0, len(events))]


def attempt_statuses(events):
    """The fold that the `attempts` view has to agree with."""
    found, closed = {}, set()
    for event in events:
        if isinstance(event, RolloutEnd):
            return {a: "lost" if s not in status.TERMINAL else s for a, s in found.items()}
        if event.attempt_id in closed:
            continue
        if event.status == status.RETRY:
            closed.add(event.attempt_id)
            if found[event.attempt_id] not in status.TERMINAL:
                found[event.attempt_id] = status.LOST
        elif status.may_follow(found.get(event.attempt_id), event.status):
            found[event.attempt_id] = event.status
    return found


def test_the_views_agree_with_the_transition_table(store, write):
    histories = [history(random.Random(seed)) for seed in range(400)]
    write(*[task for task, _ in histories], topic="millstream.tasks.normal")
    write(*[event for _, events in histories for event in events])
    rollouts = dict(store.sql("SELECT rollout_id, status FROM rollouts").rows)
    expected = {task.rollout_id: status.rollout_status(events) for task, events in histories}
    wrong = {r: (rollouts[r], s) for r, s in expected.items() if rollouts[r] != s}
    assert not wrong, [(wrong[t.rollout_id], statuses(e)) for t, e in histories if t.rollout_id in wrong][:3]
    assert set(Counter(expected.values())) == {"queued", "running", "retrying", "succeeded", "failed", "cancelled"}

    # Entry C7: a lost attempt says what happened to it.
    lost = store.sql("SELECT DISTINCT error_type, error_message != '' FROM attempts WHERE status = 'lost'").rows
    assert lost
    assert all(error and said for error, said in lost), lost
    attempts = dict(store.sql("SELECT attempt_id, status FROM attempts").rows)
    for _, events in histories:
        for attempt, state in attempt_statuses(events).items():
            assert attempts.pop(attempt) == state, statuses(events)
    assert attempts == {}


def statuses(events):
    return [e.status if isinstance(e, AttemptEvent) else f"end {e.status}" for e in events]
