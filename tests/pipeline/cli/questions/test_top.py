"""``millstream top`` on a log in memory, with and without a store."""

import asyncio
import time

import pytest
from typer.testing import CliRunner

import millstream as ms
from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.cli.main import app
from millstream.pipeline.cli.questions.top import RECENT, SLOWEST
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.wire.records import Worker


@pytest.fixture
def log(monkeypatch):
    log = MemoryLog(ms.load_settings().topics)
    monkeypatch.setattr("millstream.consumers.log.kafka_log.KafkaLog", lambda settings: log)
    return log


def test_what_can_be_asked_is_shown_and_the_rest_said(log, tmp_path, monkeypatch):
    monkeypatch.setenv("MILLSTREAM_CLICKHOUSE_DSN", f"chdb://{tmp_path / 'none'}")
    now = time.time_ns()
    worker = Worker(
        worker_id="w-1", role="runner", host="here", version="1", slots=8, running=3, started=now, last_seen=now
    )

    async def report():
        await send_acknowledged(log.producer(), ms.load_settings().topics.workers, worker, key="w-1")

    asyncio.run(report())
    shown = CliRunner().invoke(app, ["top", "--once"])
    assert shown.exit_code == 0
    assert "0 tasks wait, 3 attempts run in 8 slots" in shown.output
    assert "w-1" in shown.output
    assert "there is no store in" in shown.output


def test_its_queries_read_the_store(tmp_path):
    from millstream.consumers.sink.clickhouse import open_clickhouse_sink

    settings = ms.load_settings(clickhouse_dsn=f"chdb://{tmp_path / 'store'}")
    open_clickhouse_sink(settings).close()
    store = ms.ClickHouseStore(settings)
    assert store.sql(RECENT).columns == ("status", "rollouts", "reward", "median_s")
    assert store.sql(SLOWEST, {"shown": 3}).rows == []
    store.close()
