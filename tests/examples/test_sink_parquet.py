import asyncio
from dataclasses import replace
from datetime import UTC, datetime

import factories
import pyarrow.dataset as ds
import pytest
from sink_rig import eventually, publish, run_to_the_end

from examples.sink.parquet import ParquetSink, read_records
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.port import Batch
from millstream.consumers.sink.sink import FlushPolicy, SinkRole
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import (
    AttemptEvent,
    Control,
    DeadLetter,
    RolloutEnd,
    RolloutTask,
    Span,
    SpanEvent,
    Triplet,
)

EVENTS = Partition("millstream.events", 3)
HALF_PAST_SEVEN = 1_800_000_000_000 - 30 * 60_000  # ms; T0 is 2027-01-15 08:00


@pytest.fixture
def lake_url(tmp_path, monkeypatch):
    monkeypatch.setenv("LAKE_URL", str(tmp_path / "lake"))
    return str(tmp_path / "lake")


@pytest.fixture
def settings():
    return load_settings(kafka_partitions=3)


def records(number, *, first=0, every_ms=60_000):
    """Spans, one a minute."""
    task = factories.task()
    spans = [factories.span(task, "a", sequence=n) for n in range(first, first + number)]
    times = range(HALF_PAST_SEVEN + first * every_ms, 1 << 62, every_ms)
    return [LogRecord(EVENTS, s.sequence, t, None, codec.encode(s)) for s, t in zip(spans, times, strict=False)]


async def test_what_lies_on_the_topics_lies_in_the_lake(settings, lake_url):
    log = MemoryLog(settings.topics, encode=True)
    expected = publish(log, settings, 20)
    log.producer().send(settings.topics.tasks("low"), b"garbage", key="k", partition=2)
    sink = SinkRole(log, ParquetSink(settings), settings, name="lake", flush=FlushPolicy(100))
    await run_to_the_end(sink)
    lake = {kind: read_records(lake_url, kind) for kind in (RolloutTask, AttemptEvent, Span, Triplet)}
    assert [len(table) for table in lake.values()] == [20, 100, expected["spans"], 20]
    ends = read_records(lake_url, RolloutEnd)
    assert sorted(set(ends["log_topic"].to_pylist())) == [settings.topics.events, settings.topics.triplets]
    assert len(ends) == 40
    assert len(read_records(lake_url, Control)) == 1
    (letter,) = read_records(lake_url, DeadLetter).to_pylist()
    assert (letter["topic"], letter["log_topic"]) == (settings.topics.tasks("low"), settings.topics.dead)
    assert letter["value"] == b"garbage"
    assert sorted(set(lake[Span]["reward"].to_pylist()), key=str) == [0.5, None]


def test_files_by_hour_with_all_fields(settings, lake_url):
    sink = ParquetSink(settings)
    task = factories.task(metadata={"a": "b"}, seed=None)
    failed = factories.event(task, "x", status.FAILED, span_counts={"agent": 3})
    span = factories.call(task, "x", "r", events=(SpanEvent(name="e", time=5, attributes={"k": "v"}),))
    batch = records(60)
    batch[7] = replace(batch[7], value=codec.encode(span))
    batch[8] = replace(batch[8], value=failed)  # one that never left the process
    assert sink.write(Batch(batch, "0" * 64)) == []
    sink.flush()
    lake = ds.dataset(lake_url)
    hours = {file.removeprefix(lake_url) for file in lake.files}
    day = "date=2027-01-15"
    assert hours == {
        *(f"/Span/{day}/hour={hour}/{'0' * 64}.parquet" for hour in ("07", "08")),
        f"/AttemptEvent/{day}/hour=07/{'0' * 64}.parquet",
    }
    rows = read_records(lake_url, Span).sort_by("log_offset").to_pylist()
    assert [row["log_offset"] for row in rows] == [n for n in range(60) if n != 8]
    row = rows[7]
    assert row["log_time"] == datetime.fromtimestamp(HALF_PAST_SEVEN / 1000 + 7 * 60, UTC)
    assert dict(row["attributes"]) == span.attributes
    assert row["prompt_token_ids"] == span.prompt_token_ids
    assert row["events"] == [{"name": "e", "time": 5, "attributes": [("k", "v")]}]
    assert row["reward"] is None
    (event,) = read_records(lake_url, AttemptEvent).to_pylist()
    assert event["error"] == {"type": "ValueError", "message": "no", "stack": ""}
    assert event["span_counts"] == [("agent", 3)]


def test_what_comes_again_is_read_once(settings, lake_url):
    first, again = records(50), records(80, first=30)
    for n in range(20):
        again[n] = first[30 + n]  # the same records, in another batch, by another process
    for batch, token in ((first, "a"), (first, "a"), (again, "b")):
        sink = ParquetSink(settings)
        sink.write(Batch(batch, token))
        sink.flush()
    assert len(ds.dataset(f"{lake_url}/Span").to_table()) == 50 + 80
    table = read_records(lake_url, Span)
    assert sorted(table["log_offset"].to_pylist()) == list(range(110))


def test_nothing_is_visible_before_it_is_whole(settings, lake_url, tmp_path):
    sink = ParquetSink(settings)
    sink.write(Batch(records(3), "a"))
    (tmp_path / "lake").write_text("a file is in the way")
    with pytest.raises(StoreError, match=r"Parquet files below .*lake can't be written"):
        sink.flush()
    (tmp_path / "lake").unlink()
    sink.write(Batch(records(3), "a"))  # as the sink does after an error
    sink.flush()
    assert len(read_records(lake_url, Span)) == 3
    assert [path.name for path in (tmp_path / "lake").rglob("*.parquet")] == ["a.parquet"]


async def test_a_full_disk_is_waited_for(settings, lake_url, tmp_path):
    log = MemoryLog(settings.topics, encode=True)
    expected = publish(log, settings, 3)
    (tmp_path / "lake").write_text("a file is in the way")
    stop = asyncio.Event()
    role = SinkRole(log, ParquetSink(settings), settings, flush=FlushPolicy(1000, age_s=0.01))
    running = asyncio.create_task(role.run(stop))
    await eventually(lambda: role.trouble is not None)
    assert "can't be written" in role.trouble
    (tmp_path / "lake").unlink()
    stop.set()
    await running
    assert len(read_records(lake_url, Span)) == expected["spans"]


def test_a_place_that_pyarrow_does_not_know_is_a_config_error(settings, monkeypatch):
    monkeypatch.setenv("LAKE_URL", "gopher://x")
    with pytest.raises(ConfigError, match=r"LAKE_URL: 'gopher://x' can't be used"):
        ParquetSink(settings)
