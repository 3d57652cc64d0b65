"""Changes weights under streaming clients, kills a replica and restarts the proxy; then reads what the log says of it.

    python tests/chaos/proxy_storm.py --clients 32 --updates 50 --run-dir runs/proxy-storm

The replicas (`tests/policy_server.py`) write into each word the version that made it, so that every span can be
compared with its own text.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import openai
from checker import read, schemas
from rich.console import Console

from millstream.deploy.kafka.local import LocalKafka, free_port
from millstream.pipeline.kafka_log import KafkaLog
from millstream.schemas.identity import attempt_key, attempt_path
from millstream.schemas.ids import new_id
from millstream.schemas.settings import load_settings

ROOT = Path(__file__).parents[2]
SECRET = "storm"
HUNG_S = 60.0  # a call that takes longer hangs
MESSAGES: Any = [{"role": "user", "content": "say one two three four five six seven eight"}]
WORDS = 8
console = Console()


class Storm:
    """A broker, two replicas, and a proxy that is succeeded by another on the same port."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.broker = LocalKafka(folder / "kafka", port=0)
        self.broker.up()
        self.ports = [free_port(), free_port()]
        self.url = f"http://127.0.0.1:{free_port()}"
        self.replicas = [f"http://127.0.0.1:{port}" for port in self.ports]
        upstreams = {"model": {"urls": self.replicas, "timeout_s": 45}}
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
        self.broken, self.errors = Counter[str](), Counter[str]()

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], env=self.environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    async def start_replica(self, number: int, version: str) -> subprocess.Popen[bytes]:
        process = self.start(f"replica-{number}", "tests/policy_server.py", str(self.ports[number]), version)
        await self.answers(f"{self.replicas[number]}/health")
        return process

    async def start_proxy(self) -> subprocess.Popen[bytes]:
        """Returns once it listens, which a predecessor at the same port does too: its health port tells."""
        port = free_port()
        process = self.start(
            "proxy", "-m", "millstream.pipeline", "proxy", "--health-port", str(port), "--drain-s", "20"
        )
        await self.answers(f"http://127.0.0.1:{port}/readyz")
        return process

    async def answers(self, url: str) -> None:
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            while True:
                try:
                    async with session.get(url) as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.05)

    async def client(self) -> None:
        """One attempt after another by the official SDK, with the retries that it has by itself."""
        while not self.stop.is_set():
            rollout, attempt = new_id(), new_id()
            key = attempt_key(SECRET, rollout, attempt, valid_s=600)
            base = f"{self.url}{attempt_path(rollout, attempt)}/v1"
            async with openai.AsyncOpenAI(base_url=base, api_key=key) as sdk:
                for _ in range(5):
                    await self.call(sdk)

    async def call(self, sdk: openai.AsyncOpenAI) -> None:
        try:
            async with asyncio.timeout(HUNG_S):
                stream = await sdk.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        except TimeoutError:
            self.hung += 1
        except openai.APIError as error:
            # What a killed replica has begun to say nobody can finish: the client is told, and it is counted by itself.
            known = "broke off" in str(error) or "stream ended before" in str(error)
            (self.broken if known else self.errors)[f"{type(error).__name__}: {error}"[:120]] += 1
        else:
            if len(text.split()) != WORDS:
                self.errors[f"cut short: {text[-60:]}"] += 1
            self.done += 1

    async def run(self, clients: int, updates: int, pause_s: float) -> dict[str, Any]:
        began = time.monotonic()
        try:
            await KafkaLog(self.settings).create_topics()
            replicas = [await self.start_replica(number, "storm.0.0") for number in (0, 1)]
            proxy = await self.start_proxy()
            calling = [asyncio.create_task(self.client()) for _ in range(clients)]
            for step in range(1, updates + 1):
                version = f"storm.0.{step}"
                await self.update(step % 2, version)
                await asyncio.sleep(pause_s)
                if step == updates // 3:
                    replicas[0].kill()
                    replicas[0].wait()
                    await asyncio.sleep(pause_s)
                    replicas[0] = await self.start_replica(0, version)
                if step == 2 * updates // 3:
                    successor = await self.start_proxy()
                    proxy.send_signal(signal.SIGTERM)
                    assert await asyncio.to_thread(proxy.wait, 60) == 0
                    proxy = successor
            self.stop.set()
            await asyncio.gather(*calling)
            proxy.terminate()
            await asyncio.to_thread(proxy.wait, 60)
            found = self.check()
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
            self.broker.down()
        outcome = {"calls": self.done, "hung": self.hung, "errors": dict(self.errors), "broken": dict(self.broken)}
        return {"seconds": round(time.monotonic() - began, 1), **outcome, **found}

    async def update(self, number: int, version: str) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.replicas[number]}/version/{version}") as done,
        ):
            assert done.status == 200

    def check(self) -> dict[str, Any]:
        """Compares each span's version with the words that it holds."""
        versions, wrong, whole = Counter[str](), [], 0
        topic = self.settings.topics.events
        for name, span, _, _ in read(self.broker.bootstrap_servers, topic, schemas(ROOT / "schemas" / "avro")):
            assert name == "Span"
            if span["status"] != "Ok":
                continue
            whole += 1
            said = set(re.findall(r"@(storm\.0\.\d+)", span["attributes"]["millstream.response.message"]))
            version = span["model_version"]
            versions[version] += 1
            # An update may fall between the head and the first word, or the last word and the end: then one is said.
            if not said or (version != "mixed" and said != {version}):
                wrong.append((version, sorted(said)))
        return {"spans": whole, "mixed": versions["mixed"], "versions": len(versions) - 1, "wrong": wrong}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--pause-s", type=float, default=1.0, help="between two updates")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/proxy-storm"))
    options = parser.parse_args()

    async def storm() -> dict[str, Any]:
        return await Storm(options.run_dir.absolute()).run(options.clients, options.updates, options.pause_s)

    summary = asyncio.run(storm())
    console.print_json(json.dumps(summary))
    sys.exit(bool(summary["hung"] or summary["errors"] or summary["wrong"]))
