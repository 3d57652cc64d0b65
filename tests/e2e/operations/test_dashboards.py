"""Every query of every panel answers something: a real Prometheus that has scraped real roles, and a real store."""

import asyncio
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from confluent_kafka import Producer as RawProducer
from exposition import VLLM
from policy_server import Fault, PolicyServer

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.grafana.make import DASHBOARDS
from millstream.pipeline.addresses import LOOPBACK
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import StoreError

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian: apt-get install prometheus)"
    ),
]
RULES = Path(__file__).parents[3] / "deploy" / "prometheus" / "rules.yml"
ROLES = ("adapter", "sink", "proxy", "runner", "gateway", "trainer", "vllm")
ANSWERED_S = 400.0  # a busy machine takes minutes

AGENT = """
import random

import openai

import millstream as ms


def agent(task):
    number = task["number"]
    if number % 5 == 0:
        raise ValueError("this one fails")
    with ms.operation("search"):
        ms.emit_span("search", {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "search"})
    client = ms.openai_client().with_options(max_retries=0)
    for _ in range(3 if number % 4 == 0 else 2):
        messages = [{"role": "user", "content": f"say {number} is a number"}]
        try:
            for _ in client.chat.completions.create(model="policy", messages=messages, stream=True):
                pass
        except openai.RateLimitError:  # the limit of an attempt
            pass
    ms.emit_reward(random.random() < 0.5)
"""

TRAINER = """
import sys
from pathlib import Path

from resumable import TASKS, Chain

import millstream as ms
from millstream.pipeline.training.config import with_probes
from millstream.pipeline.training.deployment import strategy_of
from millstream.pipeline.training.reporting.metrics import TrainingMetrics


def has_signal(group):
    return len({member.end.reward for member in group.members}) > 1


class Measured(Chain):
    def update(self, groups):
        return {**super().update(groups), "entropy": 0.5}


metrics = TrainingMetrics()
trainer = ms.Trainer(
    algorithm=ms.PolicyGradient(Measured(0.2), groups_per_step=3, group_size=2, guards=(), keep=has_signal),
    run_dir=Path(sys.argv[1]),
    max_steps=100_000,
    strategy=with_probes(strategy_of("kafka"), int(sys.argv[2]), metrics),
    on_step=metrics.ended,
)
trainer.fit(TASKS)
"""


def promql(expression: str) -> str:
    return expression.replace("$__rate_interval", "20s").replace("$experiment", ".*")


def vllm_exporter() -> web.Application:
    """Serves what a vLLM has exported; its counters grow."""
    counter = re.compile(r"^(\S+(?:_total|_bucket|_count|_sum)\{.*\}) (\S+)$", re.MULTILINE)
    began = time.monotonic()

    async def metrics(request: web.Request) -> web.Response:
        times = 1.0 + time.monotonic() - began
        text = counter.sub(lambda line: f"{line[1]} {float(line[2]) * times}", VLLM.read_text())
        return web.Response(text=text, content_type="text/plain")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    return app


def sql(query: str, since: float) -> str:
    query = query.replace("(${experiment:singlequote})", "(SELECT DISTINCT experiment_id FROM rollouts_per_minute)")
    return re.sub(
        r"\$__timeFilter\((\w+)\)",
        rf"\1 >= toDateTime({since:.0f} - 60) AND \1 <= toDateTime({since:.0f} + 3600)",
        query,
    )


@pytest.mark.timeout(700)
async def test_every_query_of_every_panel_answers_something(
    watched: Callable[..., Any], kafka_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("openai")
    settings = kafka_settings()
    await KafkaLog(settings).create_topics()
    (tmp_path / "my_agent.py").write_text(AGENT)
    (tmp_path / "trainer.py").write_text(TRAINER)
    model = PolicyServer()
    model.faults.extend([Fault(status=500)] * 3)
    since = time.time()
    async with serve(model.app, f"http://{LOOPBACK}:0") as url, serve(vllm_exporter(), f"http://{LOOPBACK}:0") as vllm:
        deployment = watched(settings, model_url=url, retry_max_attempts="2")
        deployment.ports["vllm"] = int(vllm.rpartition(":")[2])
        deployment.environment["MILLSTREAM_KEY_LIMITS"] = '{"requests_per_minute": 2, "max_queue": 0}'
        deployment.environment["MILLSTREAM_PROXY_URL"] = f"http://{LOOPBACK}:{deployment.port('calls')}"
        deployment.environment["MILLSTREAM_PROXY_SECRET"] = "s" * 32
        deployment.start_store()
        await deployment.answers("store", "/ping")
        for role in ("adapter", "sink", "proxy", "gateway"):
            deployment.start_role(role)
            await deployment.answers(role, "/readyz")  # one after the other: not all start in the time of one
        deployment.start_role(
            *("runner", "my_agent:agent", "--max-attempts-per-process", "5", "--concurrency", "4"),
            *("--memory-limit", "2000"),
        )
        run_dir, port = str(tmp_path / "run"), str(deployment.port("trainer"))
        deployment.start("trainer", sys.executable, str(tmp_path / "trainer.py"), run_dir, port)
        deployment.start_prometheus(RULES.read_text(), ROLES)
        await deployment.answers("prometheus", "/-/ready")
        await poison(deployment, settings)
        waiting = {
            f"{board['uid']}: {panel['title']} {target['refId']}": target
            for board in DASHBOARDS
            for panel in board["panels"]
            for target in panel.get("targets", ())
        }
        assert len(waiting) > 60
        store = ClickHouseStore(load_settings(clickhouse_dsn=deployment.dsn))
        try:
            deadline = time.monotonic() + ANSWERED_S
            while waiting and time.monotonic() < deadline:
                await asyncio.sleep(1.0)
                for name, target in list(waiting.items()):
                    if "expr" in target:
                        answer: list[Any] = await deployment.query(promql(target["expr"]), since)
                    else:
                        try:
                            answer = await asyncio.to_thread(lambda q: store.sql(q).rows, sql(target["rawSql"], since))
                        except StoreError:  # the sink has not created it yet
                            answer = []
                    if answer:
                        del waiting[name]
        finally:
            store.close()
        alive = {name: process.poll() for name, process in deployment.processes.items()}
    assert sorted(waiting) == [], alive
    assert set(alive.values()) == {None}


async def poison(deployment: Any, settings: Settings) -> None:
    """Records that can't be used, and a task of another mode."""
    raw = RawProducer({"bootstrap.servers": settings.kafka_bootstrap_servers})
    raw.produce(settings.topics.events, b"not a record")
    raw.produce(settings.topics.control, b"not a record", key=b"x")
    assert raw.flush(20) == 0
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.post(
            f"http://{LOOPBACK}:{deployment.ports['gateway']}/tasks", json={"input": {"number": 1}, "mode": "val"}
        )
        assert answer.status_code == 202, answer.text
