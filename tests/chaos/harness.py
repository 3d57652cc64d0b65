"""Kills, freezes and restarts everything under load, then has the log checked. Prints seed and schedule.

python tests/chaos/harness.py --kills 200 --seed 1 --run-dir runs/chaos
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from secrets import token_hex
from typing import Any

from aiohttp import web
from checker import check
from rich.console import Console
from rich.table import Table

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.addresses import free_port
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import LogError
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import RolloutEnd, RolloutTask

ROOT = Path(__file__).parents[2]
LEASE_S = 3.0
OPEN = 60  # rollouts outstanding while there is killing
RUNNERS, ADAPTERS = 3, 2
RESTART_S = (0.2, 2.0)  # until what was killed is started again
BROKER_REST_S = 15.0  # between two of its deaths: all work has to come back before the next one counts
FREEZE_S = (LEASE_S + 1.5, LEASE_S + 4.0)  # longer than the lease: what thaws is a zombie
SETTLE_S = 180.0  # for the last rollouts to end
KINDS = {
    "kill runner": 5,
    "kill agent process": 4,
    "kill adapter": 4,
    "kill proxy": 3,
    "kill sink": 2,
    "freeze runner": 4,
    "freeze adapter": 3,
    "kill broker": 2,
    "remove runner": 2,
    "add runner": 2,
}
console = Console()


class Chaos:
    """One run: the deployment, the load and the killing."""

    def __init__(self, kills: int, seed: int, folder: Path) -> None:
        self.kills, self.folder = kills, folder
        self.rng = random.Random(seed)
        self.ledger = folder / "ledger.jsonl"
        self.broker = LocalKafka(folder / "kafka", port=0)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.frozen: set[str] = set()
        self.names = itertools.count(1)
        self.done = dict.fromkeys(KINDS, 0)
        self.published: list[str] = []
        self.ended: set[str] = set()
        self.schedule: list[tuple[float, str]] = []
        self.began = self.broker_up = time.monotonic()

    # The deployment

    def up(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "log").mkdir(parents=True)
        self.ledger.touch()
        self.broker.up()
        proxy, model = free_port(), free_port()
        variables = {
            "KAFKA_BOOTSTRAP_SERVERS": self.broker.bootstrap_servers,
            "PROXY_URL": f"http://127.0.0.1:{proxy}",
            "PROXY_SECRET": token_hex(16),
            "MODEL_URL": f"http://127.0.0.1:{model}",
            "CLICKHOUSE_DSN": f"chdb://{self.folder / 'store'}",
            "LEASE_S": str(LEASE_S),
        }
        self.settings = load_settings(**{name.lower(): value for name, value in variables.items()})
        self.environment = (
            os.environ
            | {f"MILLSTREAM_{name}": value for name, value in variables.items()}
            | {
                "CHAOS_LEDGER": str(self.ledger),
                "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
            }
        )
        asyncio.run(KafkaLog(self.settings).create_topics())
        threading.Thread(target=serve_model, args=(model,), daemon=True).start()
        self.start("sink", "sink")
        self.start("proxy", "proxy")
        for number in range(ADAPTERS):
            self.start(f"adapter-{number}", "adapter", "--replica", str(number))
        for _ in range(RUNNERS):
            self.add_runner()

    def start(self, name: str, *arguments: str) -> None:
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "millstream.pipeline", *arguments],
                env=self.environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name].millstream = arguments  # type: ignore[attr-defined]

    def add_runner(self) -> None:
        options = ["--processes", "2", "--concurrency", "8", "--env", "CHAOS_LEDGER", "--drain-s", "2"]
        self.start(f"runner-{next(self.names)}", "runner", "chaos_agent:agent", *options)

    def revive(self) -> None:
        """Starts again whatever has ended, as a supervisor does."""
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                self.start(name, *process.millstream)  # type: ignore[attr-defined]

    def down(self) -> None:
        for name, process in self.processes.items():
            if name in self.frozen:
                process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # The load

    async def load(self, stop: asyncio.Event) -> None:
        """Keeps `OPEN` rollouts outstanding; notes their ends."""
        log = KafkaLog(self.settings)
        topics = self.settings.topics
        producer, consumer = log.producer(), log.consumer()
        publisher = TaskPublisher(producer, self.settings)
        await consumer.assign([Partition(topics.triplets, n) for n in range(topics.partitions)])
        deadline = None
        while True:
            if stop.is_set():
                deadline = deadline or time.monotonic() + SETTLE_S
                if len(self.ended) >= len(self.published) or time.monotonic() > deadline:
                    break
            elif (room := OPEN - (len(self.published) - len(self.ended))) > 0:
                tasks = [self.task() for _ in range(room)]
                self.published += [task.rollout_id for task in tasks]
                await publisher.publish(tasks)
            try:
                for record in await consumer.poll(500, 0.2):
                    value = codec.decode(record.value) if isinstance(record, LogRecord) and record.value else None
                    if isinstance(value, RolloutEnd):
                        self.ended.add(value.rollout_id)
            except LogError:
                await asyncio.sleep(0.2)
        await consumer.close()
        producer.close()

    def task(self) -> RolloutTask:
        rollout_id = new_id()
        return RolloutTask(
            rollout_id=rollout_id,
            group_id=rollout_id,
            input=json.dumps({"seed": self.rng.random()}),
            priority=self.rng.choice(["high", "normal", "low"]),
            timeout_s=60.0,
            lease_s=LEASE_S,
            max_attempts=5,
            max_lost_attempts=100,
            retry_on=("failed", "timeout", "unresponsive"),
            created_at=time.time_ns(),
        )

    # The killing

    async def kill_all(self) -> None:
        while sum(self.done.values()) < self.kills:
            await asyncio.sleep(self.rng.uniform(0.5, 2.5))
            self.revive()
            few = [kind for kind in KINDS if self.done[kind] < 0.05 * self.kills]
            kind = self.rng.choices(few or list(KINDS), [KINDS[k] for k in few or KINDS])[0]
            if len(self.published) - len(self.ended) < OPEN // 4:
                continue  # it would hit nothing
            if await self.strike(kind):
                self.done[kind] += 1
                self.schedule.append((round(time.monotonic() - self.began, 1), kind))
                console.print(
                    f"{self.schedule[-1][0]:7.1f} s  {kind}: {len(self.ended)} of {len(self.published)} ended"
                )

    async def strike(self, kind: str) -> bool:
        """Whether it hit something that had work."""
        act, _, role = kind.partition(" ")
        if kind == "kill broker":
            if time.monotonic() - self.broker_up < BROKER_REST_S:
                return False
            self.broker.kill()
            self.broker.log.replace(self.folder / "log" / f"broker-{self.done[kind]}.log")
            await asyncio.sleep(self.rng.uniform(0.5, 3.0))
            await asyncio.to_thread(self.broker.up)
            self.broker_up = time.monotonic()
            return True
        if kind == "add runner":
            if sum(name.startswith("runner") for name in self.processes) > RUNNERS + 1:
                return False
            self.add_runner()
            return True
        alive = [n for n, p in self.processes.items() if n.startswith(role.split()[0]) and n not in self.frozen]
        if kind == "kill agent process":
            alive = [n for n in self.processes if n.startswith("runner") and n not in self.frozen]
        if not alive:
            return False
        name = self.rng.choice(alive)
        process = self.processes[name]
        children = busy_children(process.pid, self.ledger)
        if role in ("runner", "agent process") and not children:
            return False
        if kind == "remove runner":
            if len(alive) <= 1:
                return False
            process.terminate()
            del self.processes[name]
        elif kind == "kill agent process":
            os.kill(self.rng.choice(children), signal.SIGKILL)
        elif act == "freeze":
            if role == "runner":  # just as it has a success to write: thawed, it is a zombie with a late one
                await self.until_an_attempt_ends(children)
            process.send_signal(signal.SIGSTOP)
            self.frozen.add(name)
            asyncio.get_running_loop().call_later(self.rng.uniform(*FREEZE_S), self.thaw, name, process)
        else:
            process.kill()
            await asyncio.sleep(self.rng.uniform(*RESTART_S))
        return True

    async def until_an_attempt_ends(self, agents: list[int]) -> None:
        """In one of these agent processes; a second at most."""
        position, deadline = self.ledger.stat().st_size, time.monotonic() + 1.0
        while time.monotonic() < deadline:
            await asyncio.sleep(0.001)
            with self.ledger.open() as ledger:
                ledger.seek(position)
                entries = [json.loads(line) for line in ledger if line.endswith("\n")]
            if any(entry["event"] == "end" and entry["pid"] in agents for entry in entries):
                await asyncio.sleep(
                    self.rng.uniform(0.0, 0.02)
                )  # its success is on its way to the runner, or to the log
                return

    def thaw(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        self.frozen.discard(name)
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)

    async def run(self) -> None:
        stop = asyncio.Event()
        loading = asyncio.create_task(self.load(stop))
        killing = asyncio.create_task(self.kill_all())
        try:
            await asyncio.wait([loading, killing], return_when=asyncio.FIRST_COMPLETED)
            if killing.done():
                killing.result()
            stop.set()
            while not loading.done():
                self.revive()
                await asyncio.wait([loading], timeout=1.0)
            loading.result()
        finally:
            killing.cancel()


def busy_children(pid: int, ledger: Path) -> list[int]:
    """Agent processes of a runner with an attempt that has started and not ended."""
    open_attempts: dict[str, int] = {}
    for line in ledger.read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "start":
            open_attempts[entry["attempt"]] = entry["pid"]
        elif entry["event"] == "end":
            open_attempts.pop(entry["attempt"], None)
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [int(child) for child in children if int(child) in set(open_attempts.values())]


def serve_model(port: int) -> None:
    """A model server in vLLM's form; its answers are one token."""

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "ok"},
            "finish_reason": "length",
            "token_ids": [1],
            "logprobs": {"content": [{"token": "ok", "logprob": -0.1}]},
        }
        return web.json_response(
            {
                "id": f"chatcmpl-{token_hex(12)}",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "prompt_token_ids": [1, 2],
                "choices": [choice],
                "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
            }
        )

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()

    asyncio.run(serve())


def run(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """One whole run; writes and returns its summary. ``problems`` in it is empty if every promise was kept."""
    chaos = Chaos(kills, seed, folder.resolve())
    console.print(f"seed {seed}, {kills} kills, {folder}")
    try:
        chaos.up()
        asyncio.run(chaos.run())
        console.print("all is quiet; the log is checked")
        chaos.down()
        schemas = ROOT / "schemas" / "avro"
        prefix = chaos.settings.topic_prefix
        counts, problems = check(chaos.broker.bootstrap_servers, prefix, schemas, chaos.ledger, chaos.published)
    finally:
        chaos.down()
        chaos.broker.down()
    summary = {
        "kills": sum(chaos.done.values()),
        "kills_by_kind": chaos.done,
        **counts,
        "seconds": round(time.monotonic() - chaos.began, 1),
        "seed": seed,
        "schedule": chaos.schedule,
        "problems": problems,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main(kills: int, seed: int, folder: Path) -> int:
    summary = run(kills, seed, folder)
    table = Table("what", "count")
    for name, value in {**summary["kills_by_kind"], **summary}.items():
        if isinstance(value, int | float):
            table.add_row(name, str(value))
    console.print(table)
    if summary["problems"]:
        console.print(summary["problems"])
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/chaos"))
    options = parser.parse_args()
    sys.exit(main(options.kills, options.seed, options.run_dir))
