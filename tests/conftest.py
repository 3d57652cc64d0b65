"""Fixtures that several packages' tests share. Heavy imports stay inside: most tests need no broker."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from hypothesis import settings as hypothesis_settings

hypothesis_settings.register_profile("noisy", deadline=None)  # machines are: how long an example takes says nothing
hypothesis_settings.load_profile("noisy")

MARKS = {"passed": "✓", "skipped": "skipped", "failed": "FAILED", "error": "FAILED"}  # the worst last

if TYPE_CHECKING:
    from pathlib import Path

    from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
    from millstream.deploy.kafka.local import LocalKafka
    from millstream.pipeline.store.clickhouse import ClickHouseStore
    from millstream.schemas.config.settings import Settings


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kafka"):
        _require_kafka()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of frameworks and features. Here, since a run on several processes reports from one that loads no other
    conftest."""
    results: dict[str, dict[str, str]] = defaultdict(dict)
    features: dict[str, None] = {}
    for outcome, mark in MARKS.items():
        for report in terminalreporter.getreports(outcome):
            if report.when != "call" and outcome == "passed":
                continue
            for key, value in getattr(report, "user_properties", ()):
                if key == "feature":
                    framework, feature = value
                    results[framework][feature] = mark  # of several tests of a feature the worst counts: it comes last
                    features[feature] = None
    if not results:
        return
    terminalreporter.section("frameworks")
    width = max(map(len, results))
    terminalreporter.write_line(" " * width + "  " + "  ".join(features))
    for framework in sorted(results):
        cells = [results[framework].get(feature, "–").ljust(len(feature)) for feature in features]
        terminalreporter.write_line(f"{framework.ljust(width)}  {'  '.join(cells)}".rstrip())


@pytest.fixture(autouse=True)
def clients_unbound() -> Iterator[None]:
    """A later test's server may get the port at which an earlier test's proxy was."""
    yield
    if (client_binding := sys.modules.get("millstream.producers.agent.client_binding")) is not None:
        client_binding._proxies.clear()


def _require_kafka() -> None:
    """Without Java or Maven the Kafka tests are skipped; with CI=true that is a failure."""
    from millstream.deploy.kafka.local import missing_tools

    missing = missing_tools()
    if not missing:
        return
    message = f"Kafka tests need {' and '.join(missing)} on PATH"
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Path]":
    """Of the one embedded store's engine that a process can have."""
    from millstream.consumers.sink.clickhouse_connection import connect
    from millstream.schemas.config.settings import load_settings

    folder = tmp_path_factory.mktemp("runs") / "a b" / "store"
    held = connect(load_settings(clickhouse_dsn=f"chdb://{folder}"))
    yield folder
    held.close()


@pytest.fixture
def writer(settings: "Settings") -> "Iterator[ClickHouseWriter]":
    """To the store of the test's settings, with empty tables."""
    from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter

    opened = ClickHouseWriter(settings)
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def store(settings: "Settings", writer: "ClickHouseWriter") -> "Iterator[ClickHouseStore]":
    """What `writer` has written."""
    from millstream.pipeline.store.clickhouse import ClickHouseStore

    opened = ClickHouseStore(settings)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator["LocalKafka"]:
    """A real broker, started by the first test that asks for it. A test that stops it has to start it again."""
    _require_kafka()
    from millstream.deploy.kafka.local import LocalKafka

    broker = LocalKafka(tmp_path_factory.mktemp("kafka"), port=0)
    broker.up()
    yield broker
    broker.down()


@pytest.fixture
def kafka_settings(kafka_broker: "LocalKafka") -> Iterator[Callable[..., "Settings"]]:
    """Makes settings for the broker with a topic prefix of their own; the topics are deleted after the test."""
    from confluent_kafka.admin import AdminClient

    from millstream.schemas.config.settings import Settings, load_settings

    made: list[Settings] = []

    def make(**overrides: Any) -> Settings:
        settings = load_settings(
            **{
                "kafka_bootstrap_servers": kafka_broker.bootstrap_servers,
                "topic_prefix": f"t{uuid4().hex[:8]}",
                "kafka_partitions": 4,
            }
            | overrides
        )
        made.append(settings)
        return settings

    yield make
    kafka_broker.up()
    admin = AdminClient({"bootstrap.servers": kafka_broker.bootstrap_servers})
    prefixes = tuple(f"{settings.topic_prefix}." for settings in made)
    topics = [name for name in admin.list_topics(timeout=10).topics if name.startswith(prefixes)] if made else []
    if topics:
        for deleted in admin.delete_topics(topics).values():
            deleted.result(10)
