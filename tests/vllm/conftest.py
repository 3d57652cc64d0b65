"""One vLLM for all tests that can share it: it takes most of a minute to start."""

import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from millstream.schemas.settings import Settings, load_settings

PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
ARGS = (
    *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager"),
    *("--kv-cache-memory-bytes", "134217728", "--gpu-memory-utilization", "0.2"),
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and not PYTHON.exists():
        pytest.skip("there is no .venv-vllm; `make vllm` sets it up")


@dataclass
class Served:
    """What a client sees of one answer."""

    status: int
    start: str | None  # the version in the header
    end: str | None  # that at a stream's end
    tokens: list[int]
    text: str


class Client:
    """Asks as the proxy does."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url

    async def ask(self, n: int = 1, *, stream: bool = False, model: str = "policy") -> Served:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "add 3 to 8 ?"}],
            "max_tokens": n,
            "temperature": 0,
            "stream": stream,
            "return_token_ids": True,
        }
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            text = await response.text()
        ids = re.findall(r'"token_ids": ?\[([0-9, ]+)\]', text.replace('"prompt_token_ids"', '"prompt"'))
        end = re.search(r"^: x-model-version=(\S+)\n\ndata: \[DONE\]\n\n\Z", text, re.MULTILINE)
        return Served(
            response.status,
            response.headers.get("x-model-version"),
            end and end[1],
            [int(number) for part in ids for number in part.split(",")],
            text,
        )


@pytest.fixture(scope="session")
def vllm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that weights have to lie below, with a telling model in it."""
    import telling

    root = tmp_path_factory.mktemp("vllm")
    telling.create(root / "model")
    return root


@pytest.fixture(scope="session")
def vllm_settings(vllm_root: Path) -> Settings:
    return load_settings(weights_root=vllm_root, vllm_python=PYTHON)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(vllm_root: Path, vllm_settings: Settings) -> AsyncIterator:
    """A `VllmServer` of one replica, with room for adapters."""
    from millstream.pipeline.vllm_process import VllmOptions
    from millstream.pipeline.vllm_server import VllmServer

    if not PYTHON.exists():
        pytest.skip("there is no .venv-vllm; `make vllm` sets it up")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # a test machine's cores are others', too
    args = (*ARGS, "--tokenizer", str(vllm_root / "tokenizer"))
    options = VllmOptions(args=args, adapters=3)
    server = VllmServer(vllm_root / "model", options, vllm_settings, vllm_root / "run", version="tell.0.0")
    await server.start()
    yield server
    await server.close()


@pytest_asyncio.fixture(loop_scope="session")
async def client(server) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, server.urls[0])
