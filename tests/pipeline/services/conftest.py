"""A gateway, for several files."""

from collections.abc import AsyncIterator, Callable

import pytest
from gateway_rig import Client, serving

from millstream.schemas.config.settings import Settings


@pytest.fixture
async def client(kafka_settings: Callable[..., Settings]) -> AsyncIterator[Client]:
    async with serving(kafka_settings(max_record_bytes=1 << 20)) as made:
        yield made
