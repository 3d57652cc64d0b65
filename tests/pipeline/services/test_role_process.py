"""A role's process: its probes, its reports, and its end if it is stuck."""

import asyncio
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
from exposition import checked, text_of

from millstream.consumers.adapter.triplets import to_triplets
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Log
from millstream.consumers.workers import read_workers
from millstream.pipeline.addresses import LOOPBACK, free_port
from millstream.pipeline.services.health import Health, HealthPolicy
from millstream.pipeline.services.role_process import EXIT_STUCK, memory_limit, probes_answered, role_process
from millstream.pipeline.training.collector import Collector
from millstream.pipeline.training.config import with_probes
from millstream.pipeline.training.strategy import Setup
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", 1)


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


async def test_probes_are_answered_by_a_thread() -> None:
    port = free_port()
    with probes_answered(Health(list, asyncio.Event()), LOOPBACK, port):
        alive = "millstream_poll_age_seconds 0.0\nmillstream_background_age_seconds 0.0\n"
        assert get(port, "/livez") == (200, alive)  # the event loop is blocked meanwhile
        assert get(port, "/readyz")[0] == 200
        assert get(port, "/metrics")[0] == 200
        assert get(port, "/")[0] == 404
        with (
            pytest.raises(ConfigError, match=f"{port}: Address already in use"),
            probes_answered(Health(list, asyncio.Event()), LOOPBACK, port),
        ):
            pass
    with pytest.raises(URLError):
        get(port, "/livez")


async def test_idle_connections_are_bounded_in_number_and_time() -> None:
    """Section B3: any number of idle sockets leaves probes answered, and the role its file descriptors."""
    port = free_port()
    health = Health(list, asyncio.Event(), HealthPolicy(connections=4, connection_s=0.5))
    with probes_answered(health, LOOPBACK, port):
        idle = [await asyncio.open_connection(LOOPBACK, port) for _ in range(100)]
        assert (await asyncio.to_thread(get, port, "/livez"))[0] == 200  # it takes the place of an idle one
        async with asyncio.timeout(10):
            for reader, _ in idle:
                assert await reader.read() == b""
        for _, writer in idle:
            writer.close()


async def test_a_slow_head_and_an_endless_body_are_cut_off() -> None:
    port = free_port()
    health = Health(list, asyncio.Event(), HealthPolicy(connections=4, connection_s=0.3))
    with probes_answered(health, LOOPBACK, port):
        for request in (b"GET /livez HTTP/1.1\r\nHost: a", b"GET /livez HTTP/1.1\r\nContent-Length: 999\r\n\r\n"):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            writer.write(request)
            async with asyncio.timeout(10):
                await reader.read()
            writer.close()


async def test_a_role_is_reported_while_it_runs() -> None:
    settings = load_settings(topic_prefix="t", kafka_partitions=1)
    log, port = MemoryLog(TOPICS), free_port()
    async with role_process(log, settings, "sink", port, asyncio.Event()):
        async with asyncio.timeout(10):
            while not (found := await read_workers(log, TOPICS)):  # noqa: ASYNC110
                await asyncio.sleep(0)
        (worker,) = found
        assert (worker.role, worker.slots, worker.host) == ("sink", 0, socket.gethostname())
        assert "millstream_event_loop_age_seconds 0." in (await asyncio.to_thread(get, port, "/livez"))[1]
    with pytest.raises(URLError):
        await asyncio.to_thread(get, port, "/livez")


async def test_a_process_exports_what_it_uses_what_it_runs_and_what_it_reads() -> None:
    """Defect 8: CPU and memory of the process, its version and role."""
    log = MemoryLog(TOPICS)
    async with role_process(log, load_settings(), "sink", 0, asyncio.Event(), report=False) as health:
        read = log.consumers.add()
        read.read_bytes, read.unread = 100, 3
        samples = checked(text_of(health.registry))
        read.closed = True
        log.consumers.add().read_bytes = 11  # the closed one is forgotten, not what it has read
        later = checked(text_of(health.registry))
    assert samples["process_resident_memory_bytes"][()] > 1 << 20
    assert samples["process_cpu_seconds_total"][()] > 0
    assert samples["millstream_build_info"] == {(("role", "sink"), ("version", version("millstream"))): 1}
    assert samples["millstream_log_bytes_total"] == {(("direction", "read"),): 100, (("direction", "written"),): 0}
    assert later["millstream_log_bytes_total"][(("direction", "read"),)] == 111
    assert later["millstream_unread_records_total"][()] == 3


@asynccontextmanager
async def only_a_log(setup: Setup) -> AsyncIterator[tuple[Log, None]]:
    yield MemoryLog(setup.settings.topics), None


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "max\n"}, None),
        ({"memory.max": "2147483648\n"}, 2 << 30),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ({"memory/memory.limit_in_bytes": "536870912\n"}, 512 << 20),
        ({}, None),
    ],
)
def test_the_memory_limit_of_a_container_is_that_of_its_control_group(
    tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit(tmp_path) == limit


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
    import asyncio, sys, time
    from millstream.consumers.adapter.adapter import Adapter
    from millstream.consumers.log.memory_log import MemoryLog
    from millstream.pipeline.services.health import HealthPolicy
    from millstream.pipeline.services.role_process import role_process
    from millstream.producers.supervisor import supervisor
    from millstream.schemas.config.settings import load_settings
    from millstream.schemas.metrics import STARVING, TRANSACTION_AGE
    from millstream.schemas.wire.log import Partition
    from millstream.schemas.wire.topics import Topics

    async def main():
        topics = Topics("t", 1)
        log = MemoryLog(topics)
        policy = HealthPolicy(stuck_s=0.5, check_s=0.1)
        async with role_process(log, load_settings(), "sink", 0, asyncio.Event(), policy, report=False) as health:
            HOW

    async def die():
        raise ValueError("a bug")

    async def poll_once(log, topics):
        consumer = log.consumer()
        await consumer.assign([Partition(topics.control, 0)])
        await consumer.poll(1, 0)
        await asyncio.sleep(60)

    async def lose_a_call(log, topics, health):
        type(log.transactional_producer("t")).init_transactions = lambda *_: time.sleep(60)
        adapter = Adapter(log, topics, transactional_id="t")
        health.check(TRANSACTION_AGE, lambda: adapter.call_age_s)
        await adapter.run(asyncio.Event())

    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("await poll_once(log, topics)", "millstream_poll_age_seconds is"),
        ("time.sleep(60)", "millstream_event_loop_age_seconds is"),
        ("health.check(STARVING, lambda: 1.0); await asyncio.sleep(60)", "millstream_starving_seconds is"),
        ("await lose_a_call(log, topics, health)", "millstream_transaction_call_seconds is"),
        ("supervisor().job('x', die()); await asyncio.sleep(60)", "task x was ended by ValueError: a bug"),
        ("supervisor().thread('x', sys.exit); await asyncio.sleep(60)", "thread x was ended by SystemExit"),
    ],
)
def test_a_stuck_process_ends_with_a_code_of_its_own(how: str, why: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STUCK).replace("HOW", how)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == EXIT_STUCK
    assert why in done.stderr
    assert "this process is stuck" in done.stderr
    assert "(most recent call first)" in done.stderr  # the stack of each thread
    assert "in run_regularly\n" in done.stderr  # and of each task
