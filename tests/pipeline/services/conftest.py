"""The monitor, for several files."""

from collections.abc import AsyncIterator, Callable

import pytest
from gateway_rig import Client, monitored

from millstream.schemas.config.settings import Settings


@pytest.fixture
async def client(kafka_settings: Callable[..., Settings]) -> AsyncIterator[Client]:
    async with monitored(kafka_settings(max_record_bytes=1 << 20)) as made:
        yield made
