import factories
import pytest

from millstream.consumers.rows import TABLES, to_rows
from millstream.schemas import codec
from millstream.schemas.ids import derived_id, new_id
from millstream.schemas.log import LogRecord, Partition
from millstream.schemas.records import DeadLetter, RolloutEnd, SpanEvent, SpanLink

EVENTS = "millstream.events"
BOTH = pytest.mark.parametrize("encoded", [False, True], ids=["live", "encoded"])


def place(values, encoded, topic=EVENTS):
    """Records at offsets 10, 11, … of partition 3."""
    return [
        LogRecord(
            Partition(topic, 3),
            at,
            1_800_000_000_000,
            "k",
            codec.encode(v) if encoded and not isinstance(v, bytes) else v,
        )
        for at, v in enumerate(values, 10)
    ]


def dicts(rows):
    """Rows as people see them, by table."""
    return {
        r.table: [dict(zip(r.column_names, row, strict=True)) for row in zip(*r.columns, strict=True)] for r in rows
    }


@BOTH
def test_a_span_keeps_all_that_opentelemetry_knows_of_it(encoded):
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
    rows, unusable = to_rows(place([span], encoded), EVENTS)
    (row,) = dicts(rows)["spans_raw"]
    assert not unusable
    assert (
        row
        | {
            "Timestamp": 1_000,
            "Duration": 3_500,
            "TraceId": span.trace_id,
            "ParentSpanId": "b" * 16,
            "TraceState": "x=1",
            "ServiceName": "calculator",
            "ScopeName": "openai",
            "StatusCode": "Error",
            "StatusMessage": "boom",
            "Events.Timestamp": [2_000],
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
            "Partition": 3,
            "Offset": 10,
        }
        == row
    )


@BOTH
def test_a_claim_is_an_attempt_and_tells_its_task_again(encoded):
    task = factories.task(resources_id="v7")
    rows, _ = to_rows(place([factories.event(task, "a", "preparing")], encoded), EVENTS)
    found = dicts(rows)
    assert [(r["rollout_id"], r["resources_id"], r["claimed"]) for r in found["tasks_raw"]] == [
        (task.rollout_id, "v7", 1)
    ]
    assert [(r["rollout_id"], r["status"], r["offset"]) for r in found["attempts_raw"]] == [
        (task.rollout_id, "preparing", 10)
    ]


@BOTH
def test_what_is_sent_again_has_the_same_identity_and_the_partition_of_its_rollout(encoded):
    day = 20_000
    task = factories.task(rollout_id=derived_id(day * 86_400_000_000_000 + 5, "x"))
    rows, _ = to_rows(place([task, task], encoded, "millstream.tasks.normal"), EVENTS)
    (table,) = rows
    assert list(table.columns[table.column_names.index("date")]) == [day, day]
    assert [r["rollout_id"] for r in dicts(rows)["tasks_raw"]] == [task.rollout_id] * 2


@pytest.mark.parametrize("rollout_id", ["not-a-uuid", "", "ffffffff-ffff-7fff-bfff-ffffffffffff"])
def test_an_id_without_a_usable_date_still_has_a_row(rollout_id):
    task = factories.task()
    span = factories.span(task, "a", rollout_id=rollout_id)
    rows, unusable = to_rows(place([span], True), EVENTS)
    assert [(r["RolloutId"], r["Date"]) for r in dicts(rows)["spans_raw"]] == [(rollout_id, 0)]
    assert not unusable


def test_an_end_counts_once():
    end = RolloutEnd(
        rollout_id=new_id(), group_id="g", group_size=1, status="failed", attempts=1, created_at=1, ended_at=2
    )
    mark, _ = to_rows(place([end], True), EVENTS)
    copy, _ = to_rows(place([end], True, "millstream.triplets"), EVENTS)
    assert [len(rows) for rows in mark] == [1]
    assert copy == []


def test_a_dead_letter_keeps_its_own_place_and_that_of_what_was_refused():
    letter = DeadLetter(
        topic="t", partition=7, offset=99, value=b"\xff", timestamp=5, role="adapter", reason="r", error="e", time=6
    )
    rows, _ = to_rows(place([letter], True, "millstream.dead"), EVENTS)
    (row,) = dicts(rows)["dead_letters_raw"]
    assert (row["source_topic"], row["source_partition"], row["source_offset"]) == ("t", 7, 99)
    assert (row["topic"], row["partition"], row["offset"]) == ("millstream.dead", 3, 10)
    assert to_rows(place([letter], True), EVENTS) == ([], [])  # the adapter's mark, without the body


def test_tokens_are_counted_or_taken_from_the_provider():
    task = factories.task()
    usage = {"gen_ai.usage.input_tokens": "12", "gen_ai.usage.output_tokens": "many"}
    spans = [
        factories.call(task, "a", "1", attributes=usage, prompt_token_ids=None, response_token_ids=None),
        factories.call(task, "a", "2", attributes=usage, response_token_ids=b""),
    ]
    rows, _ = to_rows(place(spans, True), EVENTS)
    assert [(r["PromptTokens"], r["ResponseTokens"]) for r in dicts(rows)["spans_raw"]] == [(12, 0), (3, 0)]


def test_one_broken_record_among_good_ones():
    task = factories.task()
    good = [factories.span(task, "a", sequence=n) for n in (1, 2)]
    uneven = factories.span(task, "a", prompt_token_ids=b"12345")
    broken = [b"garbage", codec.encode(good[0])[:-3], b"", codec.encode(uneven)]
    records = place([good[0], *broken, good[1]], True)
    rows, unusable = to_rows(records, EVENTS)
    assert [r["Sequence"] for r in dicts(rows)["spans_raw"]] == [1, 2]
    assert [item.record for item in unusable] == records[1:5]
    assert [item.reason for item in unusable] == ["undecodable"] * 3 + ["unstorable"]
    assert unusable[3].error == "Span.prompt_token_ids: 5 bytes are no numbers of four bytes each"


@pytest.mark.parametrize("junk", [b"", b"garbage", codec.encode(factories.span(factories.task(), "a"))])
def test_a_claim_without_a_good_task_is_an_attempt_all_the_same(junk):
    claim = factories.event(factories.task(), "a", "preparing", task=junk)  # the adapter puts it away
    rows, unusable = to_rows(place([claim], True), EVENTS)
    assert [(r["status"], r["attempt_id"]) for r in dicts(rows)["attempts_raw"]] == [("preparing", "a")]
    assert not unusable
    assert "tasks_raw" not in dicts(rows)


def test_every_row_says_where_its_record_lies():
    for table in TABLES:
        assert [name.lower() for name in list(table.columns)[-3:]] == ["topic", "partition", "offset"], table.name


def test_live_and_encoded_records_make_the_same_rows():
    task = factories.task(metadata={"a": "b"}, retry_on=("failed",), state=b"\x00", seed=3)
    values = [
        task,
        factories.event(task, "a", "preparing"),
        factories.event(task, "a", "failed", span_counts={"agent": 2}),
        factories.reward(task, "a", 0.5),
    ]
    live, _ = to_rows(place(values, False), EVENTS)
    encoded, _ = to_rows(place(values, True), EVENTS)

    def plain(rows):
        return {
            table: [{k: list(v) if isinstance(v, tuple) else v for k, v in row.items()} for row in found]
            for table, found in dicts(rows).items()
        }

    assert plain(live) == plain(encoded)
    assert len(plain(live)["tasks_raw"]) == 2
