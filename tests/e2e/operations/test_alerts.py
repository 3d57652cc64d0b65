"""Alerts reach a webhook through a real Prometheus and a real Alertmanager, and clear, as the files that are shipped
say. Only waiting times and addresses are others."""

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.addresses import LOOPBACK
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.config.settings import Settings

FOLDER = Path(__file__).parents[3] / "deploy" / "prometheus"
CONFIG = FOLDER / "alertmanager.yml"
INSTALLED = all(
    any(shutil.which(name) for name in names)
    for names in (["prometheus"], ["alertmanager", "prometheus-alertmanager"])  # Debian's name
)
HEARD_S = 90.0  # of an alert, on a busy machine

AGENT = """
import time
from pathlib import Path


def agent(task):
    while not Path(task["until"]).exists():
        time.sleep(0.1)
"""


class Webhook:
    """Keeps what Alertmanager last said of each alert."""

    def __init__(self) -> None:
        self.heard: dict[tuple[str, str], tuple[str, str]] = {}  # (status, receiver) by alert and role
        self._changed = asyncio.Condition()
        self.app = web.Application()
        self.app.router.add_post("/{receiver}", self._notify)

    async def _notify(self, request: web.Request) -> web.Response:
        for alert in (await request.json())["alerts"]:
            labels = alert["labels"]
            self.heard[labels["alertname"], labels.get("role", "")] = alert["status"], request.match_info["receiver"]
        async with self._changed:
            self._changed.notify_all()
        return web.Response()

    async def hears(self, alert: str, role: str, status: str) -> None:
        async with self._changed:
            try:
                async with asyncio.timeout(HEARD_S):
                    await self._changed.wait_for(lambda: self.heard.get((alert, role), ("", ""))[0] == status)
            except TimeoutError:
                pytest.fail(f"{alert} of {role} is not {status}: {self.heard}")


@asynccontextmanager
async def webhook() -> AsyncIterator[tuple[Webhook, str]]:
    hook = Webhook()
    async with serve(hook.app, f"http://{LOOPBACK}:0") as url:
        yield hook, url


def impatient(rules: str) -> str:
    """The rules with shorter waits."""
    rules = re.sub(r"\bfor: \w+", "for: 1s", rules)
    assert "millstream_sink_outage_seconds > 60" in rules
    assert "millstream_heartbeat_age_seconds > 15" in rules
    rules = rules.replace("millstream_sink_outage_seconds > 60", "millstream_sink_outage_seconds > 2")
    return rules.replace("millstream_heartbeat_age_seconds > 15", "millstream_heartbeat_age_seconds > 14")


@pytest.mark.skipif(
    shutil.which("amtool") is None, reason="amtool is not installed: apt-get install prometheus-alertmanager"
)
def test_amtool_accepts_what_is_shipped() -> None:
    done = subprocess.run(["amtool", "check-config", CONFIG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    routes = {"critical": "pager", "warning": "team", "info": "none"}
    for severity, receiver in routes.items():
        asked = ["amtool", "config", "routes", "test", f"--config.file={CONFIG}", f"severity={severity}"]
        assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == receiver


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.skipif(not INSTALLED, reason="not installed: apt-get install prometheus prometheus-alertmanager")
async def test_a_killed_role_a_stopped_store_and_a_stopped_kafka_alert_and_clear(
    watched: Callable[..., Any],
    kafka_broker: LocalKafka,
    kafka_settings: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    settings = kafka_settings()
    await KafkaLog(settings).create_topics()
    (tmp_path / "my_agent.py").write_text(AGENT)
    (tmp_path / "tasks.jsonl").write_text(f'{{"input": {{"until": "{tmp_path / "over"}"}}}}\n')
    deployment = watched(settings, proxy_url="", lease_s="120")
    async with webhook() as (hook, url):
        deployment.start_store()
        await deployment.answers("store", "/ping")
        deployment.start_role("sink")
        deployment.start_role("runner", "my_agent:agent")
        config = re.sub(r"http://(\w+)\.example:8080/alerts", rf"{url}/\1", CONFIG.read_text())
        config = re.sub(r"(group_wait|group_interval): \w+", r"\1: 1s", config)
        deployment.start_alertmanager(config)
        await deployment.answers("alertmanager", "/-/ready")
        deployment.start_prometheus(impatient((FOLDER / "rules.yml").read_text()), ("sink", "runner"), True)
        for role in ("sink", "runner"):
            await deployment.answers(role, "/readyz")

        deployment.kill("runner")
        await hook.hears("MillstreamRoleDown", "runner", "firing")
        deployment.start("runner")
        await hook.hears("MillstreamRoleDown", "runner", "resolved")

        deployment.kill("store")  # the processes' reports are what it misses
        await hook.hears("MillstreamStoreAway", "sink", "firing")
        deployment.start("store")
        await hook.hears("MillstreamStoreAway", "sink", "resolved")

        publish = [sys.executable, "-m", "millstream.pipeline", "publish", "tasks.jsonl"]
        await asyncio.to_thread(
            lambda: subprocess.run(publish, cwd=tmp_path, env=deployment.environment, check=True, capture_output=True)
        )
        while not await deployment.query("millstream_runner_running > 0"):  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        await asyncio.to_thread(kafka_broker.down)
        await hook.hears("MillstreamHeartbeatsLate", "runner", "firing")
        await asyncio.to_thread(kafka_broker.up)
        await hook.hears("MillstreamHeartbeatsLate", "runner", "resolved")
        (tmp_path / "over").touch()
        assert hook.heard["MillstreamStoreAway", "sink"][1] == "pager"
        assert hook.heard["MillstreamHeartbeatsLate", "runner"][1] == "chat"
