"""How tests start vLLM, and ask it."""

import re
from dataclasses import dataclass
from pathlib import Path

import aiohttp

ENGINE = "VLLM::EngineCor"  # what the kernel keeps of the name of the engine's process
PYTHON = Path(__file__).parents[3] / ".venv-vllm/bin/python"
ARGS = (
    *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager"),
    *("--kv-cache-memory-bytes", "134217728", "--gpu-memory-utilization", "0.2"),
)


@dataclass
class Served:
    """What a client sees of one answer."""

    status: int
    start: str | None  # the version in the header
    end: str | None  # that at a stream's end
    changes: list[str]  # those within a stream
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
            re.findall(r"^: x-model-version=(\S+)$", text, re.MULTILINE)[:-1],
            [int(number) for part in ids for number in part.split(",")],
            text,
        )


def processes_of(pid: int) -> list[tuple[str, int]]:
    """It, and all that it has started: name and pid of each."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [processes_of(int(child)) for task in tasks for child in task.read_text().split()]
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    return [(name, pid), *(found for more in children for found in more)]
