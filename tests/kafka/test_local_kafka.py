"""The launcher: a folder holds one broker, which any process may start or stop."""

import os
import socket
from pathlib import Path

import pytest

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import HOST, LocalKafka
from millstream.pipeline.addresses import free_port
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.log import LogRecord, Partition


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.kafka
async def test_a_killed_broker_starts_again_with_its_data_and_any_process_stops_it(tmp_path: Path) -> None:
    kafka = LocalKafka(tmp_path / "kafka", port=0)
    assert kafka.status() is None
    try:
        first = kafka.up()
        assert kafka.up().pid == first.pid  # already running
        settings = load_settings(kafka_bootstrap_servers=first.bootstrap_servers, kafka_partitions=1)
        log = KafkaLog(settings)
        await log.create_topics()
        producer = log.producer()
        await send_acknowledged(producer, settings.topics.events, b"kept", key="k")
        producer.close()
        assert kafka.kill()
        assert kafka.status() is None
        assert not runs(first.pid)

        second = kafka.up()
        assert second.bootstrap_servers == first.bootstrap_servers
        consumer = log.consumer()
        await consumer.assign([Partition(settings.topics.events, 0)])
        (record,) = await consumer.poll(10, 20.0)
        assert isinstance(record, LogRecord)
        assert record.value == b"kept"
        await consumer.close()

        other = LocalKafka(tmp_path / "kafka")  # as another process would see it
        status = other.status()
        assert status is not None
        assert (status.pid, status.bootstrap_servers) == (second.pid, second.bootstrap_servers)
        assert "Kafka Server started" in kafka.log.read_text()
        assert other.down()
        assert not runs(second.pid)
        assert kafka.status() is None
        assert not other.down()
    finally:
        kafka.kill()


@pytest.mark.kafka
def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            LocalKafka(tmp_path, port=port).up()


@pytest.mark.kafka
def test_a_broker_that_can_not_start_says_why(tmp_path: Path) -> None:
    kafka = LocalKafka(tmp_path, port=0, properties={"inter.broker.listener.name": "NOWHERE"})
    with pytest.raises(ConfigError, match="NOWHERE"):
        kafka.up()
    assert kafka.status() is None


def test_without_java_or_maven_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ConfigError, match="Java 17"):
        LocalKafka(tmp_path, port=0).up()
    java = tmp_path / "java"
    java.write_text("")
    java.chmod(0o755)
    with pytest.raises(ConfigError, match="Maven"):
        LocalKafka(tmp_path, port=0).up()
