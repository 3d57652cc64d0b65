"""Steering a runner process by the command line, on a real Kafka."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from exposition import checked, exported
from runner_rig import Rig, by_input, terminal, write_agent

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.schemas.config.settings import Settings
from millstream.schemas.metrics import CATALOGUE
from millstream.schemas.wire.records import Span

pytestmark = pytest.mark.kafka

AGENT = """
    import asyncio
    import millstream as ms
    from prometheus_client import Counter

    ENDED = Counter("my_ended", "Attempts, by how they ended.", ["status"])

    class Monitor(ms.Hook):
        def on_trace_end(self, agent, runner, tracer, rollout):
            ENDED.labels(tracer.status).inc()

    async def agent(input):
        ms.emit_span("began")
        await asyncio.sleep(60 if input == "slow" else 0)
        return 1.0
"""


async def test_cancel_pause_workers_lag_and_a_second_interrupt(
    tmp_path: Path, kafka_settings: Callable[..., Settings]
) -> None:
    settings = kafka_settings(proxy_url="")
    rig = Rig(KafkaLog(settings), settings)
    await rig.log.create_topics()
    write_agent(tmp_path, AGENT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")} | {
        "COLUMNS": "200",
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
        "MILLSTREAM_PROXY_URL": "",
    }
    command = [sys.executable, "-m", "millstream.pipeline"]

    def millstream(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    millstream("pause", "held")
    paused = await rig.publish(range(4), experiment_id="held")  # one on each partition
    (slow,) = await rig.publish(["slow"], priority="high")
    arguments = [
        "runner",
        "my_agent:agent",
        "--concurrency",
        "2",
        "--hook",
        "my_agent:Monitor",
        "--health-port",
        str(port),
    ]
    runner = await asyncio.create_subprocess_exec(*command, *arguments, cwd=tmp_path, env=environment)
    try:
        await rig.read_until(lambda events: any(isinstance(e, Span) and e.name == "began" for e in events))
        assert await asyncio.to_thread(_ready, port)
        (worker,) = json.loads(millstream("workers", "--json"))
        assert (worker["role"], worker["slots"]) == ("runner", 2)
        rows = {row["priority"]: row for row in json.loads(millstream("lag", "--json"))}
        assert (rows["high"]["unclaimed"], rows["normal"]["unclaimed"]) == (0, 4)
        assert rows["all"]["slots"] == 2
        millstream("cancel", slow.rollout_id)
        (ended,) = (await rig.ends(1)).values()
        assert (ended.task.rollout_id, ended.last.status) == (slow.rollout_id, "cancelled")
        millstream("resume", "held")
        found = by_input(await rig.read_until(lambda events: len(terminal(events)) >= 5))
        assert {one.task.rollout_id for one in found.values()} == {t.rollout_id for t in [*paused, slow]}
        counted = await asyncio.to_thread(_get, port, "/metrics")
        assert 'my_ended_total{status="succeeded"} 4.0' in counted
        assert 'my_ended_total{status="cancelled"} 1.0' in counted
        samples = checked(counted)
        assert exported(counted) >= {m.exported for m in CATALOGUE["Runner"]} - {"millstream_memory_limit_bytes"}
        ended = samples["millstream_attempts_total"]
        assert {dict(labels)["status"]: n for labels, n in ended.items()} == {"succeeded": 4, "cancelled": 1}
        assert samples["millstream_runner_slots"] == {(): 2}
        assert samples["millstream_agent_process_cpu_seconds_total"][()] > 0
        assert samples["millstream_log_bytes_total"][(("direction", "written"),)] > 1000
        assert samples["millstream_log_bytes_total"][(("direction", "read"),)] > 1000
        alive = await asyncio.to_thread(_get, port, "/livez")
        assert [line.split()[0] for line in alive.splitlines()] == [
            "millstream_poll_age_seconds",
            "millstream_background_age_seconds",
            "millstream_event_loop_age_seconds",
            "millstream_starving_seconds",
        ]
        await rig.publish(["slow"])
        await rig.read_until(lambda es: sum(isinstance(e, Span) and e.name == "began" for e in es) >= 6)
        runner.send_signal(signal.SIGINT)  # drains: its attempt still runs
        async with asyncio.timeout(10):
            while await asyncio.to_thread(_ready, port):
                pass
        assert runner.returncode is None
        runner.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(runner.wait(), 5) == 130
    finally:
        if runner.returncode is None:
            runner.kill()
            await runner.wait()


def _get(port: int, path: str) -> str:
    with urlopen(f"http://127.0.0.1:{port}{path}") as response:
        return str(response.read().decode())


def _ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/readyz") as response:
            return bool(response.status == 200)
    except HTTPError:
        return False
