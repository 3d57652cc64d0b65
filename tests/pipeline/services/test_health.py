"""What a probe sees of a role, and what becomes of one that is stuck."""

import asyncio
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest

from millstream.consumers.adapter.triplets import to_triplets
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Log
from millstream.consumers.workers import read_workers
from millstream.pipeline.addresses import free_port
from millstream.pipeline.services import health as health_module
from millstream.pipeline.services.health import EXIT_STUCK, Health, watched
from millstream.pipeline.training.collector import Collector
from millstream.pipeline.training.config import with_probes
from millstream.pipeline.training.strategy import Setup
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.metrics import RUNNING, STARVING
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", 1)


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


async def test_who_rests_between_polls_may_do_so_but_not_within_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(health_module.time, "monotonic", lambda: now[0])
    health = Health(MemoryLog(TOPICS), asyncio.Event(), allow_idle=True)
    consumer = health.log.consumer()
    await consumer.assign([Partition(TOPICS.control, 0)])
    await consumer.poll(1, 0)
    now[0] += 10 * health_module.STUCK_S
    assert health.answer("/livez")[0] == 200
    monkeypatch.undo()
    poll = asyncio.create_task(consumer.poll(1, 60))
    await asyncio.sleep(0)
    began = health_module.time.monotonic()
    monkeypatch.setattr(health_module.time, "monotonic", lambda: began + health_module.STUCK_S + 1)
    assert health.answer("/livez")[0] == 503
    poll.cancel()


async def test_an_age_beyond_the_limit_is_told_by_name() -> None:
    health = Health(MemoryLog(TOPICS), asyncio.Event())
    seconds = 0.0
    health.age(STARVING, lambda: seconds)
    assert health.answer("/livez") == (200, b"millstream_poll_age_seconds 0.0\nmillstream_starving_seconds 0.0\n")
    seconds = health_module.STUCK_S + 1
    http_status, body = health.answer("/livez")
    assert (http_status, "millstream_starving_seconds 301.0" in body.decode()) == (503, True)
    assert b"millstream_starving_seconds 301.0" in health.answer("/metrics")[1]


async def test_a_role_tells_of_itself_while_it_runs() -> None:
    log, port = MemoryLog(TOPICS), free_port()
    async with watched(log, TOPICS, "sink", port, asyncio.Event()) as health:
        async with asyncio.timeout(10):
            while not (found := await read_workers(log, TOPICS)):  # noqa: ASYNC110
                await asyncio.sleep(0)
        (worker,) = found
        assert (worker.role, worker.slots, worker.host) == ("sink", 0, socket.gethostname())
        assert (await asyncio.to_thread(get, port, "/livez"))[0] == 200
        assert health.poll_age < 5  # its event loop was heard of
    with pytest.raises(URLError):
        get(port, "/livez")


@asynccontextmanager
async def only_a_log(setup: Setup) -> AsyncIterator[tuple[Log, None]]:
    yield MemoryLog(setup.settings.topics), None


async def test_a_trainer_has_probes_and_reports_its_state(tmp_path: Path) -> None:
    port, settings = free_port(), load_settings()
    setup = Setup(settings=settings, agent=None, to_triplets=to_triplets, run_dir=tmp_path)
    async with with_probes(only_a_log, port)(setup) as (log, _):
        collector = Collector(log, settings.topics, log.producer())
        await collector.start()
        assert (await asyncio.to_thread(get, port, "/readyz"))[0] == 503
        collecting = asyncio.create_task(collector.collect(["none"]))
        async with asyncio.timeout(10):
            while (await asyncio.to_thread(get, port, "/readyz"))[0] != 200:
                pass
        assert [worker.role for worker in await read_workers(log, settings.topics)] == ["trainer"]
        collecting.cancel()
        await asyncio.wait([collecting])


STUCK = """
    import asyncio, time
    from millstream.consumers.adapter.adapter import Adapter
    from millstream.pipeline.services import health
    from millstream.consumers.log.memory_log import MemoryLog
    from millstream.schemas.wire.log import Partition
    from millstream.schemas.metrics import STARVING, TRANSACTION_AGE
    from millstream.schemas.wire.topics import Topics

    health.STUCK_S = health.CHECK_S = 0.1

    async def main():
        watched = health.Health(MemoryLog(Topics("t", 1)), asyncio.Event())
        watched.start(0)
        HOW

    async def lose_a_call(watched):
        type(watched.log.transactional_producer("t")).init_transactions = lambda *_: time.sleep(60)
        adapter = Adapter(watched.log, Topics("t", 1), transactional_id="t")
        watched.age(TRANSACTION_AGE, lambda: adapter.call_s)
        await adapter.run(asyncio.Event())

    asyncio.run(main())
"""


@pytest.mark.parametrize(
    "how",
    [
        "c = watched.log.consumer(); await c.assign([Partition('t.control', 0)]); await c.poll(1, 0); time.sleep(60)",
        "watched.heard('event loop'); time.sleep(60)",
        "watched.age(STARVING, lambda: 1.0); await asyncio.sleep(60)",
        "await lose_a_call(watched)",
    ],
    ids=["consumer", "event loop", "starving", "transaction"],
)
def test_a_stuck_process_ends_with_a_code_of_its_own(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STUCK).replace("HOW", how)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == EXIT_STUCK
    assert "this process is stuck" in done.stderr
