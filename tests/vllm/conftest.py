"""One vLLM for all tests that can share it: it takes most of a minute to start."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
import versioned_model
from vllm_rig import ARGS, PYTHON, Client

from millstream.schemas.config.settings import Settings, load_settings


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and not PYTHON.exists():
        pytest.skip("there is no .venv-vllm; `make vllm` sets it up")


@pytest.fixture(scope="session")
def vllm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that weights have to lie below, with a versioned model in it."""

    root = tmp_path_factory.mktemp("vllm")
    versioned_model.create(root / "model")
    return root


@pytest.fixture(scope="session")
def vllm_settings(vllm_root: Path) -> Settings:
    return load_settings(weights_root=vllm_root, vllm_python=PYTHON)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(vllm_root: Path, vllm_settings: Settings) -> AsyncIterator:
    """A `VllmServer` of one replica, with room for adapters."""
    from millstream.pipeline.models.vllm_process import VllmOptions
    from millstream.pipeline.models.vllm_server import VllmServer

    if not PYTHON.exists():
        pytest.skip("there is no .venv-vllm; `make vllm` sets it up")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # a test machine's cores are others', too
    args = (
        *ARGS,
        "--tokenizer",
        str(vllm_root / "tokenizer"),
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
    )
    options = VllmOptions(args=args, adapters=3)
    server = VllmServer(vllm_root / "model", options, vllm_settings, vllm_root / "run", version="tell.0.0")
    await server.start()
    yield server
    await server.close()


@pytest_asyncio.fixture(loop_scope="session")
async def client(server) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, server.urls[0])
