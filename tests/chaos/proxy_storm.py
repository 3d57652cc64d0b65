"""Changes weights under streaming clients, kills a replica and restarts the proxy; then reads the log.

    python tests/chaos/proxy_storm.py --clients 32 --updates 50 --run-dir runs/proxy-storm
    python tests/chaos/proxy_storm.py --vllm --run-dir runs/vllm-storm

The tokens of the replicas (`storm_replicas.py`) show which version made them, so that every span can be compared with
its own answer.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
from checker import read, schemas
from rich.console import Console
from storm_replicas import Replicas, Vllm, Words, answers, named

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.addresses import free_port
from millstream.schemas.attempt_keys import attempt_key, attempt_path
from millstream.schemas.config.settings import load_settings
from millstream.schemas.ids import new_id

ROOT = Path(__file__).parents[2]
SECRET = "storm" * 7
HUNG_S = 60.0  # a call that takes longer hangs
TEXTLESS = range(37, 41)  # versions whose tokens would have no text
console = Console()


class Storm:
    """A broker, two replicas, and a proxy that another one replaces on the same port."""

    def __init__(self, folder: Path, *, vllm: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.broker = LocalKafka(folder / "kafka", port=0)
        self.broker.up()
        self.url = f"http://127.0.0.1:{free_port()}"
        self.replicas: Replicas = Vllm(folder) if vllm else Words(self.start)
        upstreams = {"model": {"urls": self.replicas.urls, "timeout_s": 45}}
        self.settings = load_settings(kafka_bootstrap_servers=self.broker.bootstrap_servers)
        self.environment = os.environ | {
            "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": self.broker.bootstrap_servers,
            "MILLSTREAM_PROXY_SECRET": SECRET,
            "MILLSTREAM_PROXY_URL": self.url,
            "MILLSTREAM_UPSTREAMS": json.dumps(upstreams),
            "MILLSTREAM_ROUTES": json.dumps({"*": "model"}),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stop = asyncio.Event()
        self.done, self.hung = 0, 0
        self.streaming, self.enough = 0, 0  # clients that read a stream; how many of them set `amid`
        self.amid = asyncio.Event()
        self.errors = Counter[str]()

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], env=self.environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    async def start_proxy(self) -> subprocess.Popen[bytes]:
        """Returns once it listens. Its predecessor listens at the same port, so the health port shows it."""
        port = free_port()
        process = self.start(
            "proxy", "-m", "millstream.pipeline", "proxy", "--health-port", str(port), "--drain-s", "20", "--reuse-port"
        )
        await answers(f"http://127.0.0.1:{port}/readyz")
        return process

    async def client(self, sdk: openai.AsyncOpenAI) -> None:
        """One attempt after another by the official SDK, with its own retries."""
        while not self.stop.is_set():
            rollout, attempt = new_id(), new_id()
            key = attempt_key(SECRET, rollout, attempt, valid_s=600)
            base = f"{self.url}{attempt_path(rollout, attempt)}/v1"
            for _ in range(5):
                await self.call(sdk.with_options(base_url=base, api_key=key))

    async def call(self, sdk: openai.AsyncOpenAI) -> None:
        try:
            async with asyncio.timeout(HUNG_S):
                stream = await sdk.chat.completions.create(model="policy", stream=True, **self.replicas.asked)
                text = await self.read(stream)
        except TimeoutError:
            self.hung += 1
        except openai.APIError as error:
            self.errors[f"{type(error).__name__}: {error}"[:120]] += 1
        else:
            if not self.replicas.whole(text):
                self.errors[f"not the answer asked for: {text}"] += 1
            self.done += 1

    async def read(self, stream: Any) -> str:
        text = ""
        self.streaming += 1
        try:
            async for chunk in stream:
                text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                if self.streaming >= self.enough and text:
                    self.amid.set()
        finally:
            self.streaming -= 1
        return text

    async def kill_amid_streams(self) -> None:
        """Replicas share calls with bounded loads, so with most clients in a stream each replica has some."""
        self.amid.clear()
        await asyncio.wait_for(self.amid.wait(), HUNG_S)
        await self.replicas.kill(0)

    async def run(self, clients: int, updates: int, pause_s: float) -> dict[str, Any]:
        began = time.monotonic()
        self.enough = 3 * clients // 4
        numbers = [n for n in range(updates + 5) if n not in TEXTLESS]
        try:
            await KafkaLog(self.settings).create_topics()
            await self.replicas.start()
            proxy = await self.start_proxy()
            sdk = openai.AsyncOpenAI(api_key="each attempt has its own")  # making one takes longer than many calls
            calling = [asyncio.create_task(self.client(sdk)) for _ in range(clients)]
            killed: asyncio.Task[None] | None = None
            for step in range(1, updates + 1):
                away = killed is not None and not killed.done()
                await self.replicas.update(1 if away else step % 2, numbers[step])
                await asyncio.sleep(pause_s)
                if step == updates // 3:
                    killed = asyncio.create_task(self.kill_amid_streams())
                if step == 2 * updates // 3:
                    successor = await self.start_proxy()
                    proxy.send_signal(signal.SIGTERM)
                    assert await asyncio.to_thread(proxy.wait, 60) == 0
                    proxy = successor
            assert killed is not None
            await killed
            await asyncio.sleep(5.0)  # calls to the one that is back
            self.stop.set()
            await asyncio.gather(*calling)
            await sdk.close()
            proxy.terminate()
            await asyncio.to_thread(proxy.wait, 60)
            found = self.check()
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
            await self.replicas.close()
            self.broker.down()
        outcome = {"calls": self.done, "hung": self.hung, "errors": dict(self.errors)}
        return {"seconds": round(time.monotonic() - began, 1), **outcome, **found}

    def check(self) -> dict[str, Any]:
        """Compares each span's version with the tokens that it holds."""
        versions, wrong, failed = set[int](), [], Counter[str]()
        spans, mixed, continued = 0, 0, 0
        topic = self.settings.topics.events
        for name, span, _, _ in read(self.broker.bootstrap_servers, topic, schemas(ROOT / "schemas" / "avro")):
            assert name == "Span"
            if span["status"] != "Ok":
                failed[span["status_message"][:120]] += 1
                continue
            made_by, version = self.replicas.made_by(span), span["model_version"]
            spans, mixed, versions = spans + 1, mixed + (version == "mixed"), versions | made_by
            continued += "millstream.continued" in span["attributes"]
            if not made_by or version != (named(*made_by) if len(made_by) == 1 else "mixed"):
                wrong.append((version, sorted(made_by)))
        counts = {"spans": spans, "mixed": mixed, "versions": len(versions), "continued": continued}
        return counts | {"failed": dict(failed), "wrong": wrong}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--pause-s", type=float, default=1.0, help="between two updates")
    parser.add_argument("--vllm", action="store_true", help="two real vLLMs instead of servers for tests")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/proxy-storm"))
    options = parser.parse_args()

    async def storm() -> dict[str, Any]:
        storm = Storm(options.run_dir.absolute(), vllm=options.vllm)
        return await storm.run(options.clients, options.updates, options.pause_s)

    summary = asyncio.run(storm())
    console.print_json(json.dumps(summary))
    lost = summary["calls"] != summary["spans"]
    sys.exit(bool(lost or summary["hung"] or summary["errors"] or summary["wrong"]))
