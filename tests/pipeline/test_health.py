"""What a probe sees of a role, and what becomes of one that is stuck."""

import asyncio
import socket
import subprocess
import sys
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from millstream.pipeline import health as health_module
from millstream.pipeline.health import EXIT_STUCK, Health
from millstream.pipeline.memory_log import MemoryLog
from millstream.schemas.errors import ConfigError
from millstream.schemas.log import Partition
from millstream.schemas.metrics import RUNNING
from millstream.schemas.topics import Topics

TOPICS = Topics("t", 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


async def test_a_role_is_ready_when_all_its_consumers_poll_and_until_it_stops() -> None:
    stop, port = asyncio.Event(), free_port()
    health = Health(MemoryLog(TOPICS), stop)
    health.gauge(RUNNING, lambda: 3)
    health.start(port)
    first, second = health.log.consumer(), health.log.consumer("g")
    await first.assign([Partition(TOPICS.control, 0)])
    await second.subscribe([TOPICS.events])
    await first.poll(1, 0)
    assert (await asyncio.to_thread(get, port, "/readyz"))[0] == 503
    await second.poll(1, 0)
    assert (await asyncio.to_thread(get, port, "/readyz"))[0] == 200
    assert (await asyncio.to_thread(get, port, "/livez"))[0] == 200
    assert (await asyncio.to_thread(get, port, "/"))[0] == 404
    text = (await asyncio.to_thread(get, port, "/metrics"))[1]
    assert "millstream_running 3.0" in text
    assert "# HELP millstream_poll_age_seconds" in text
    stop.set()
    assert (await asyncio.to_thread(get, port, "/readyz"))[0] == 503
    with pytest.raises(ConfigError, match=f"--health-port {port}: Address already in use"):
        health.start(port)


async def test_the_consumer_that_polls_least_counts_and_one_that_is_closed_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(health_module.time, "monotonic", lambda: now[0])
    health = Health(MemoryLog(TOPICS), asyncio.Event())
    first, second = health.log.consumer(), health.log.consumer()
    for consumer in (first, second):
        await consumer.assign([Partition(TOPICS.control, 0)])
        await consumer.poll(1, 0)
    now[0] += health_module.STUCK_S + 1
    await first.poll(1, 0)
    assert health.poll_age == health_module.STUCK_S + 1
    assert health.answer("/livez")[0] == 503
    await second.close()
    assert health.poll_age == 0
    assert health.answer("/livez")[0] == 200


STUCK = """
    import asyncio, time
    from millstream.pipeline import health
    from millstream.pipeline.memory_log import MemoryLog
    from millstream.schemas.log import Partition
    from millstream.schemas.topics import Topics

    health.STUCK_S = health.CHECK_S = 0.1

    async def main():
        watched = health.Health(MemoryLog(Topics("t", 1)), asyncio.Event())
        watched.start(0)
        consumer = watched.log.consumer()
        await consumer.assign([Partition("t.control", 0)])
        await consumer.poll(1, 0)
        time.sleep(60)  # the event loop hangs

    asyncio.run(main())
"""


def test_a_stuck_process_ends_with_a_code_of_its_own() -> None:
    import textwrap

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STUCK)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == EXIT_STUCK
    assert "this process is stuck" in done.stderr
