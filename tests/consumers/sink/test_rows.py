from dataclasses import replace
from io import BytesIO

import factories
import fastavro
import pytest

from millstream.consumers.sink.encoded_spans import EncodedSpans
from millstream.consumers.sink.rows import TABLES, to_rows
from millstream.schemas.ids import derived_id, new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import DeadLetter, RolloutEnd, Triplet

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
        r.table: list(fastavro.reader(BytesIO(r.file())))
        if isinstance(r, EncodedSpans)
        else [dict(zip(r.column_names, row, strict=True)) for row in zip(*r.columns, strict=True)]
        for r in rows
    }


@BOTH
def test_a_span_lies_in_an_avro_file_between_its_place_and_its_offset(encoded):
    task = factories.task()
    spans = [factories.call(task, "a", f"r{n}", sequence=n) for n in range(300)]
    rows, unusable = to_rows(place(spans, encoded), EVENTS)
    found = dicts(rows)["span_records"]
    assert not unusable
    assert [(r["log_topic"], r["log_partition"], r["log_offset"]) for r in found] == [
        (EVENTS, 3, at) for at in range(10, 310)
    ]
    assert all(r["log_end"] == r["log_offset"] for r in found)
    for row, span in zip(found, spans, strict=True):
        assert {name: row[name] for name in codec.CODECS[type(span)].field_names} == codec.CODECS[
            type(span)
        ].decode_dict(codec.encode(span))


@BOTH
def test_a_claim_is_an_attempt_and_repeats_its_task(encoded):
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
    event = factories.event(factories.task(), "a", "failed", rollout_id=rollout_id)
    rows, unusable = to_rows(place([event], True), EVENTS)
    assert [(r["rollout_id"], r["date"]) for r in dicts(rows)["attempts_raw"]] == [(rollout_id, 0)]
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


def test_one_broken_record_among_good_ones():
    task = factories.task()
    good = [factories.span(task, "a", sequence=n) for n in (1, 2)]
    records = place([good[0], b"garbage", b"", good[1]], True)
    rows, unusable = to_rows(records, EVENTS)
    assert [r["sequence"] for r in dicts(rows)["span_records"]] == [1, 2]
    assert [item.record for item in unusable] == records[1:3]
    assert {item.reason for item in unusable} == {"undecodable"}


@pytest.mark.parametrize(
    "junk", [b"", b"garbage", codec.encode(factories.span(factories.task(), "a")), codec.encode(factories.task())]
)
def test_a_claim_without_a_good_task_is_an_attempt_all_the_same(junk):
    claim = factories.event(factories.task(), "a", "preparing", task=junk)  # the adapter puts it away
    rows, unusable = to_rows(place([claim], True), EVENTS)
    assert [(r["status"], r["attempt_id"]) for r in dicts(rows)["attempts_raw"]] == [("preparing", "a")]
    assert not unusable
    assert "tasks_raw" not in dicts(rows)


def test_a_broken_span_is_sifted_out_when_its_rows_were_refused():
    task = factories.task()
    good = codec.encode(factories.span(task, "a", sequence=7))
    (rows,), unusable = to_rows(place([good, good[:-3], good + b"x", good], True), EVENTS)
    assert (len(rows), unusable) == (4, [])
    kept, broken = rows.sift()
    assert [(at, reason, "Span" in error) for at, reason, error in broken] == [
        ((EVENTS, 3, 11), "undecodable", True),
        ((EVENTS, 3, 12), "undecodable", True),
    ]
    assert [kept.place(n)[-1] for n in range(len(kept))] == [10, 13]
    assert [r["sequence"] for r in fastavro.reader(BytesIO(kept.cut(1, 2).file()))] == [7]


@pytest.mark.parametrize("field", ["prompt_token_ids", "response_token_ids", "response_logprobs"])
@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("kind", ["span", "triplet"])
def test_rows_of_uneven_token_bytes_are_sifted_out_all_at_once(kind, encoded, field):
    """Section A: halving a block until each is alone takes a minute for some hundred of them."""
    of = factories.task()
    ids = {"rollout_id": of.rollout_id, "attempt_id": "a", "group_id": "g", "span_id": "s"}
    given = factories.span(of, "a") if kind == "span" else Triplet(**ids, turn=0, prompt="", response="")
    found = [given, *(replace(given, **{field: bytes(size)}) for size in (4, 5, 8, 3)), given]
    (rows,), _ = to_rows(place(found, encoded), EVENTS)
    kept, broken = rows.sift()
    assert [(at[-1], reason) for at, reason, _ in broken] == [(12, "unstorable"), (14, "unstorable")]
    assert all("end within a number" in error for *_, error in broken)
    assert [kept.place(n)[-1] for n in range(len(kept))] == [10, 11, 13, 15]


def test_every_row_says_where_its_record_lies():
    for table in TABLES.values():
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
