"""The pages over a real store with real rows, and a log in memory."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.pipeline.ui.app import ui_app
from millstream.pipeline.ui.source import Source
from millstream.schemas.config.settings import load_settings
from millstream.schemas.ids import new_id
from tests.pipeline.ui.rig import World, Writing, fill


@pytest.fixture(scope="module")
def world(folder: Any) -> Iterator[World]:
    settings = load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_database=f"d{new_id().replace('-', '')}")
    writer = ClickHouseWriter(settings)
    writer.migrate()
    made = World(settings, MemoryLog(settings.topics, encode=True))
    writing = Writing(settings.topics)
    fill(writing, made)
    writing.flush(writer)
    yield made
    writer.close()


@pytest.fixture(scope="module")
def browser(world: World) -> Iterator[TestClient]:
    """Without a token, at a name of this machine."""
    source = Source(world.settings, world.log)
    with TestClient(ui_app(source), base_url="http://127.0.0.1:8700", follow_redirects=False) as client:
        yield client
    source.close()
