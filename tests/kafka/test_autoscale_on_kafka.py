"""`millstream autoscale` on a real Kafka: runners come with the work and go without it, and nothing is lost."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runner_rig import Rig, write_agent

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.workers import is_alive, read_workers
from millstream.schemas.config.settings import Settings
from millstream.schemas.wire.records import RolloutEnd, Worker

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.chaos]
TASKS = 12
SCALED_S = 90.0  # on a busy machine

AGENT = """
    import asyncio
    from pathlib import Path

    async def agent(task):
        while not Path(task).exists():
            await asyncio.sleep(0.1)
        return 1.0
"""


@pytest.mark.timeout(400)
async def test_runners_come_with_the_work_and_go_without_it(
    tmp_path: Path, kafka_settings: Callable[..., Settings]
) -> None:
    settings = kafka_settings(proxy_url="", lease_s=5.0)
    log = KafkaLog(settings)
    await log.create_topics()
    write_agent(tmp_path, AGENT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")} | {
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
        "MILLSTREAM_PROXY_URL": "",
        "MILLSTREAM_LEASE_S": "5",
    }

    async def start(*arguments: str) -> asyncio.subprocess.Process:
        command = sys.executable, "-m", "millstream.pipeline", *arguments
        return await asyncio.create_subprocess_exec(*command, env=environment, cwd=tmp_path)

    async def runners(enough: Callable[[list[Worker]], bool]) -> list[Worker]:
        """Those that live and claim tasks, once they are as wanted."""
        async with asyncio.timeout(SCALED_S):
            while True:
                found = await read_workers(log, settings.topics)
                found = [w for w in found if w.role == "runner" and w.slots and is_alive(w, time.time_ns())]
                if enough(found):
                    return found
                await asyncio.sleep(0.2)

    adapter = await start("adapter")
    scaler = await start(
        "autoscale", "--max", "3", "--idle-s", "3", "--", "runner", "my_agent:agent", "--concurrency=2"
    )
    rig = Rig(log, settings)
    try:
        await runners(lambda found: len(found) == 1)
        await rig.publish(["long", *["short"] * TASKS])
        grown = await runners(lambda found: len(found) == 3 and sum(w.running for w in found) > 4)
        killed = next(w.worker_id for w in grown if w.running)
        os.kill(pid_of(killed), signal.SIGKILL)
        await runners(lambda found: len({w.worker_id for w in found} - {killed}) == 3)

        (tmp_path / "short").touch()
        (left,) = await runners(lambda found: len(found) == 1 and found[0].running == 1)
        (tmp_path / "long").touch()  # what it runs is the long one: it was not stopped

        def all_ended(events: list[object]) -> bool:
            return sum(isinstance(event, RolloutEnd) for event in events) > TASKS

        ends = [event for event in await rig.read_until(all_ended) if isinstance(event, RolloutEnd)]
        assert len({end.rollout_id for end in ends}) == len(ends) == TASKS + 1
        assert {end.status for end in ends} == {"succeeded"}
        assert sum(end.lost_attempts for end in ends) <= 2, "only those of the killed runner"
        scaler.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await scaler.wait() == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid_of(left.worker_id), 0)
    finally:
        for process in (scaler, adapter):
            if process.returncode is None:
                process.terminate()
                await process.wait()


def pid_of(worker_id: str) -> int:
    return int(worker_id.split("-")[-2])
