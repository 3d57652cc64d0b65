"""The two replicas of a storm, whose answers show the weights that made them."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.request import Request, urlopen

import aiohttp

from millstream.pipeline.addresses import free_port
from millstream.schemas.config.settings import load_settings

TESTS = Path(__file__).parents[1]
Start = Callable[..., "subprocess.Popen[bytes]"]


class Replicas(Protocol):
    """Versions are numbers here; in spans they are `named`."""

    urls: list[str]
    asked: dict[str, Any]  # of the official SDK

    async def start(self) -> None: ...

    async def update(self, replica: int, number: int) -> None: ...

    async def kill(self, replica: int) -> None:
        """Returns when it is back with the weights that it had."""

    def whole(self, text: str) -> bool:
        """Whether it is the answer that was asked for."""

    def made_by(self, span: dict[str, Any]) -> set[int]:
        """The versions of its tokens."""

    async def close(self) -> None: ...


def named(number: int) -> str:
    return f"storm.0.{number}"


async def answers(url: str) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(60):
        while True:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


class Words:
    """Two of `tests/support/policy_server.py`, which writes into each word the version that made it."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._ports = [free_port(), free_port()]
        self._numbers = [0, 0]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._answer = "one two three four five six seven eight"
        self.urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        self.asked = {"messages": [{"role": "user", "content": f"say {self._answer}"}]}

    async def start(self) -> None:
        self._processes = [self._started(replica) for replica in (0, 1)]
        await asyncio.gather(*(answers(f"{url}/health") for url in self.urls))

    async def update(self, replica: int, number: int) -> None:
        url = f"{self.urls[replica]}/version/{named(number)}"
        async with aiohttp.ClientSession() as session, session.post(url) as done:
            assert done.status == 200
        self._numbers[replica] = number

    @staticmethod
    def _kill(process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()

    async def kill(self, replica: int) -> None:
        await asyncio.to_thread(self._kill, self._processes[replica])
        await asyncio.sleep(1.0)
        self._processes[replica] = self._started(replica)
        await answers(f"{self.urls[replica]}/health")

    def whole(self, text: str) -> bool:
        return re.sub("@[^ ]*", "", text) == self._answer

    def made_by(self, span: dict[str, Any]) -> set[int]:
        return {int(n) for n in re.findall(r"@storm\.0\.(\d+)", span["attributes"]["millstream.response.message"])}

    async def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _started(self, replica: int) -> "subprocess.Popen[bytes]":
        version, port = named(self._numbers[replica]), str(self._ports[replica])
        return self._start(f"replica-{replica}", "tests/support/policy_server.py", port, version, self._answer)


class Vllm:
    """Two real vLLMs with the versioned model, whose tokens are those of their version. A killed one is restarted by
    its supervisor, as in production."""

    TOKENS = 64

    def __init__(self, folder: Path) -> None:
        sys.path += [str(TESTS / "support"), str(TESTS / "support" / "vllm"), str(TESTS.parent)]
        import versioned_model
        from vllm_rig import ARGS, PYTHON

        from millstream.pipeline.models.vllm_process import VllmOptions
        from millstream.pipeline.models.vllm_server import VllmServer

        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # a test machine's cores are shared
        self._model, self._folder = versioned_model, folder / "vllm"
        versioned_model.create(self._folder / "model")
        settings = load_settings(weights_root=self._folder, vllm_python=PYTHON)
        options = VllmOptions(args=(*ARGS, "--tokenizer", str(self._folder / "tokenizer")), replicas=2)
        model, run = self._folder / "model", self._folder / "run"
        self._server = VllmServer(model, options, settings, run, version=named(0))
        self.urls = self._server.urls
        self.asked = {
            "messages": [{"role": "user", "content": "add 3 to 8 ?"}],
            "max_tokens": self.TOKENS,
            "temperature": 0.0,
        }

    async def start(self) -> None:
        await self._server.start()

    async def update(self, replica: int, number: int) -> None:
        from millstream.pipeline.models.weight_files import save

        saved = save(self._folder / "versions", self._model.weights(number), named(number))
        await self._server.replicas[replica].load(saved)

    @staticmethod
    def _kill_busy(process: Any) -> None:
        """During some streams, and in a thread, as `Words` does."""
        metrics = Request(f"{process.url}/metrics", headers={"x-millstream-admin": process.token})
        for _ in range(6000):
            with urlopen(metrics) as answer:
                text = answer.read().decode()
            running = re.findall(r"^vllm:num_requests_running\S* (\S+)$", text, re.MULTILINE)
            if sum(map(float, running)) >= 4:
                time.sleep(0.05)  # so that they have begun
                return os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.01)
        raise TimeoutError("the replica was idle for a minute")

    async def kill(self, replica: int) -> None:
        killed = self._server.replicas[replica]
        await asyncio.to_thread(self._kill_busy, killed.process)
        async with asyncio.timeout(300):
            while killed.restarts == 0:  # noqa: ASYNC110 - its supervisor has no event
                await asyncio.sleep(0.2)
        body = {"model": "policy", "prompt": [1, 1], "max_tokens": 1, "temperature": 0, "return_token_ids": True}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{killed.process.url}/v1/completions", json=body) as made,
        ):
            (choice,) = (await made.json())["choices"]
            version = made.headers["x-model-version"]
        assert version == killed.good.version == named(self._number(choice["token_ids"][0]))

    def whole(self, text: str) -> bool:
        return len(text.split()) == self.TOKENS

    def made_by(self, span: dict[str, Any]) -> set[int]:
        ids = memoryview(span["response_token_ids"]).cast("i")
        return {self._number(token) for token in ids} if len(ids) == self.TOKENS else set()

    async def close(self) -> None:
        await self._server.close()

    def _number(self, token: int) -> int:
        return (self._model.AIM - token) % self._model.MOVED
