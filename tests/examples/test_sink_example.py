import asyncio
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import factories
import pytest

from millstream.consumers.log.kafka_log import KafkaLog


def rewards(file):
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            return database.execute("SELECT name, count(*), sum(value) FROM rewards GROUP BY name").fetchall()
    except sqlite3.OperationalError:  # not there yet
        return []


@pytest.mark.kafka
async def test_the_sink_example_keeps_rewards(tmp_path, kafka_settings):
    settings = kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    producer = log.producer()
    for n in range(20):
        task = factories.task()
        for record in (factories.span(task, "a"), factories.reward(task, "a", n / 10)):
            producer.send(settings.topics.events, record, key=task.rollout_id)
    producer.close(20.0)
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
    }
    command = [sys.executable, "-m", "millstream.pipeline", "sink", "--sink", "examples.sink.sqlite:RewardsSink"]
    sink = await asyncio.create_subprocess_exec(*command, "--flush-ms", "100", cwd=tmp_path, env=env)
    try:
        async with asyncio.timeout(30):
            while not rewards(tmp_path / "rewards.db"):  # noqa: ASYNC110 - SQLite has no events
                await asyncio.sleep(0.1)
    finally:
        sink.terminate()
    assert await sink.wait() == 0
    assert rewards(tmp_path / "rewards.db") == [("reward", 20, pytest.approx(19.0))]
