"""Every role as a process: its probes, its reports, and how it stops."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from exposition import checked, exported

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.workers import read_workers
from millstream.pipeline.addresses import free_port
from millstream.schemas.config.settings import Settings
from millstream.schemas.metrics import CATALOGUE

pytestmark = pytest.mark.kafka


async def test_every_role_has_probes_and_reports_itself(
    tmp_path: Path, kafka_settings: Callable[..., Settings]
) -> None:
    settings = kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")} | {
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
        "MILLSTREAM_PROXY_URL": f"http://127.0.0.1:{free_port()}",
        "MILLSTREAM_CLICKHOUSE_DSN": f"chdb://{tmp_path}/store",
    }
    ports = {role: free_port() for role in ("adapter", "sink", "proxy", "gateway")}
    processes = {
        role: await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millstream.pipeline", role),
            *("--port" if role == "gateway" else "--health-port", str(port)),
            env=environment,
            cwd=tmp_path,
        )
        for role, port in ports.items()
    }
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(120):

            async def get(role: str, path: str) -> tuple[int, str]:
                try:
                    async with http.get(f"http://127.0.0.1:{ports[role]}{path}") as response:
                        return response.status, await response.text()
                except aiohttp.ClientConnectionError:  # not up yet
                    assert processes[role].returncode is None
                    return 0, ""

            for role in ports:
                while (await get(role, "/readyz"))[0] != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                assert (await get(role, "/livez"))[0] == 200
                wanted = {metric.exported for metric in CATALOGUE[role.title()]}
                while not wanted <= exported(text := (await get(role, "/metrics"))[1]):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)  # a sink first opens its store
                samples = checked(text)
                assert samples["millstream_poll_age_seconds"][()] >= 0
                (labels,) = samples["millstream_build_info"]
                assert dict(labels)["role"] == role
            async with http.post(f"http://127.0.0.1:{ports['gateway']}/tasks", json={"input": 1}) as published:
                assert published.status == 202
            load = {"work": 0}
            while load["work"] != 1:  # an answer is given again for two seconds
                load = json.loads((await get("gateway", "/load"))[1])
            assert (load["unclaimed"]["normal"], load["running"], load["slots"], load["load"]) == (1, 0, 0, None)
            samples = checked((await get("gateway", "/metrics"))[1])
            assert samples["millstream_unclaimed_tasks"][(("priority", "normal"),)] == 1
            while len(found := await read_workers(log, settings.topics)) < len(ports):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert {worker.role for worker in found} == set(ports)
        assert {worker.worker_id.split("-")[-2] for worker in found} == {str(p.pid) for p in processes.values()}
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert [await process.wait() for process in processes.values()] == [0] * len(processes)
    finally:
        for process in processes.values():
            if process.returncode is None:
                process.kill()
                await process.wait()
