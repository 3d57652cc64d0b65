from collections.abc import AsyncIterator

import pytest
from proxy_rig import Rig, rig_of


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with rig_of() as found:
        yield found
