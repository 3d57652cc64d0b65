"""Roles as processes, with a Prometheus and an Alertmanager that watch them."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from millstream.pipeline.addresses import LOOPBACK, free_port
from millstream.schemas.config.settings import Settings

ROOT = Path(__file__).parents[3]
SUPPORT = ROOT / "tests" / "support"
SCRAPE = "1s"
START_S = 120.0  # of a process, on a busy machine


class Watched:
    """Processes by name: roles of one deployment, its store (a ClickHouse server's HTTP interface), Prometheus and
    Alertmanager. A process that is started again has the same port."""

    def __init__(self, folder: Path, settings: Settings, **variables: str) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}
        self._commands: dict[str, list[str]] = {}
        self.dsn = f"clickhouse://default@{LOOPBACK}:{self.port('store')}?compress=0"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")} | {
            "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
            "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
            "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
            "MILLSTREAM_CLICKHOUSE_DSN": self.dsn,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, SUPPORT, folder))),
        }
        self.environment |= {f"MILLSTREAM_{name.upper()}": value for name, value in variables.items()}

    def port(self, name: str) -> int:
        return self.ports.setdefault(name, free_port())

    def start(self, name: str, *command: str) -> None:
        """Starts it, or starts it again, without a command."""
        self._commands.setdefault(name, list(command))
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self._commands[name], cwd=self.folder, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def start_role(self, role: str, *arguments: str) -> None:
        port = ["--port" if role == "gateway" else "--health-port", str(self.port(role))]
        self.start(role, sys.executable, "-m", "millstream.pipeline", role, *arguments, *port)

    def start_store(self) -> None:
        (self.folder / "store").mkdir(exist_ok=True)
        server = str(SUPPORT / "clickhouse_http.py")
        self.start("store", sys.executable, server, str(self.folder / "store"), str(self.port("store")))

    def start_prometheus(self, rules: str, roles: tuple[str, ...], alertmanager: bool = False) -> None:
        targets = "".join(
            f"      - {{targets: ['{LOOPBACK}:{self.port(role)}'], labels: {{role: {role}}}}}\n" for role in roles
        )
        managers = f"{LOOPBACK}:{self.port('alertmanager')}"
        alerting = f"alerting: {{alertmanagers: [{{static_configs: [{{targets: ['{managers}']}}]}}]}}\n"
        (self.folder / "rules.yml").write_text(rules)
        (self.folder / "prometheus.yml").write_text(
            f"global: {{scrape_interval: {SCRAPE}, evaluation_interval: {SCRAPE}}}\n"
            f"rule_files: [rules.yml]\n{alerting if alertmanager else ''}"
            f"scrape_configs:\n  - job_name: millstream\n    static_configs:\n{targets}"
        )
        listen = f"--web.listen-address={LOOPBACK}:{self.port('prometheus')}"
        self.start("prometheus", "prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb", listen)

    def start_alertmanager(self, config: str) -> None:
        (self.folder / "alertmanager.yml").write_text(config)
        listen = f"--web.listen-address={LOOPBACK}:{self.port('alertmanager')}"
        command = shutil.which("alertmanager") or shutil.which("prometheus-alertmanager") or ""
        options = ["--config.file=alertmanager.yml", "--storage.path=alerts", "--cluster.listen-address="]
        self.start("alertmanager", command, *options, listen)

    async def answers(self, name: str, path: str) -> None:
        """Waits until the process answers with 200."""
        async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(START_S):
            while True:
                try:
                    if (await http.get(f"http://{LOOPBACK}:{self.ports[name]}{path}")).status_code == 200:
                        return
                except httpx.TransportError:
                    assert self.processes[name].poll() is None, (self.folder / f"{name}.log").read_text()[-3000:]
                await asyncio.sleep(0.2)

    async def query(self, expression: str, since: float | None = None) -> list[float]:
        """The finite values that a query has had since then, by default in the last ten seconds."""
        now = time.time()
        asked = {"query": expression, "start": since or now - 10.0, "end": now, "step": 1.0}
        async with httpx.AsyncClient(trust_env=False) as http:
            url = f"http://{LOOPBACK}:{self.ports['prometheus']}/api/v1/query_range"
            answer: dict[str, Any] = (await http.post(url, data=asked)).json()
        assert answer["status"] == "success", (expression, answer)
        values = [float(value) for series in answer["data"]["result"] for _, value in series["values"]]
        return [value for value in values if abs(value) < float("inf")]

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def close(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def watched(tmp_path: Path, kafka_settings: object) -> Iterator[Callable[..., Watched]]:
    """Makes a `Watched` of a deployment's settings and its ``MILLSTREAM_`` variables; ends its processes, before
    ``kafka_settings`` deletes their topics."""
    made: list[Watched] = []

    def make(settings: Settings, **variables: str) -> Watched:
        made.append(Watched(tmp_path, settings, **variables))
        return made[-1]

    yield make
    for each in made:
        each.close()
