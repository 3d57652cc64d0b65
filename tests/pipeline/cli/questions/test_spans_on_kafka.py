"""``millstream spans ROLLOUT --follow`` on a real log."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import factories
import pytest

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.schemas.config.settings import Settings
from millstream.schemas.wire import status
from millstream.schemas.wire.records import RolloutEnd
from tests.pipeline.ui.rig import Writing

pytestmark = pytest.mark.kafka


def test_each_span_is_a_line_as_it_comes_until_the_rollout_ends(
    kafka_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = kafka_settings(clickhouse_dsn=f"chdb://{tmp_path / 'store'}")
    asyncio.run(KafkaLog(settings).create_topics())
    task = factories.task(created_at=time.time_ns())
    first, second, third = (factories.span(task, "a", name=f"span {n}", sequence=n) for n in range(3))
    writer, writing = ClickHouseWriter(settings), Writing(settings.topics)
    writer.migrate()
    writing(task, topic=settings.topics.tasks("normal"))
    writing(factories.event(task, "a", status.PREPARING), first)
    writing.flush(writer)
    writer.close()  # for the command, which opens the folder

    producer = KafkaLog(settings).producer()

    def send(*values: object) -> None:
        for value in values:
            producer.send(settings.topics.events, value, key=task.rollout_id)  # type: ignore[arg-type]
        producer.flush(10)

    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")} | {
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_CLICKHOUSE_DSN": settings.clickhouse_dsn,
    }
    command = [sys.executable, "-m", "millstream.pipeline", "spans", task.rollout_id[-12:], "--follow"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        try:
            assert " span 0 " in following.stdout.readline()  # that of the store
            send(factories.event(task, "a", status.PREPARING), first, second)
            assert " span 1 " in following.stdout.readline()
            end = {"group_id": "g", "group_size": 1, "status": "succeeded", "attempts": 1}
            send(third, RolloutEnd(rollout_id=task.rollout_id, created_at=1, ended_at=2, **end))
            (last,) = following.stdout.readlines()
            assert " span 2 " in last
        finally:
            following.terminate()
            producer.close()
    assert following.returncode == 0
