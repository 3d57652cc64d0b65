import asyncio
from collections.abc import AsyncIterator

import pytest
import uvloop
from proxy_rig import Rig, rig_of


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with rig_of() as found:
        yield found


def pytest_asyncio_loop_factories(config, item):
    """The proxy's process runs on uvloop. A trainer that runs the proxy itself uses asyncio's own loop."""
    loops = {"uvloop": uvloop.new_event_loop}
    if item.path.name == "test_http_client.py":
        loops["asyncio"] = asyncio.new_event_loop
    return loops
