"""The processes of an autoscaler, without a broker."""

import asyncio
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.services.autoscale.autoscaler import AutoscalePolicy, Autoscaler
from millstream.pipeline.services.autoscale.scaling import ScalePolicy
from millstream.pipeline.services.child_roles import RestartPolicy
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.records import Worker
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", 4)
QUICK = AutoscalePolicy(look_s=0.02, drain_s=10.0, restart=RestartPolicy(first_s=0.01, longest_s=0.02))


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


WAITS = python("import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); signal.pause()")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - processes have no events
            await asyncio.sleep(0.01)


async def test_a_runner_that_is_misconfigured_ends_the_scaler() -> None:
    scaler = Autoscaler(MemoryLog(TOPICS), TOPICS, python("import sys; sys.exit(2)"), ScalePolicy(), QUICK)
    with pytest.raises(ConfigError, match="ended with exit code 2"):
        await asyncio.wait_for(scaler.run(asyncio.Event()), 20)


async def test_a_runner_that_is_stuck_is_started_again(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); import os; os._exit(4)"
    stop = asyncio.Event()
    scaler = Autoscaler(MemoryLog(TOPICS), TOPICS, python(code), ScalePolicy(highest=1), QUICK)
    running = asyncio.create_task(scaler.run(stop))
    await until(lambda: (tmp_path / "starts").exists() and len((tmp_path / "starts").read_text()) > 2)
    stop.set()
    await asyncio.wait_for(running, 20)


async def test_runners_come_and_go_by_their_own_reports() -> None:
    """One that has reported a running attempt stays; an idle one is stopped, gracefully."""
    log, stop = MemoryLog(TOPICS), asyncio.Event()
    scaler = Autoscaler(log, TOPICS, WAITS, ScalePolicy(1, 3, calm_s=0.2), QUICK, health_port=9101)
    running = asyncio.create_task(scaler.run(stop))
    producer = log.producer()

    def report(pid: int, busy: int, host: str = "") -> None:
        host = host or socket.gethostname()
        worker = Worker(
            worker_id=f"{host}-{pid}-abcdef",
            role="runner",
            host=host,
            version="1",
            slots=2,
            running=busy,
            started=pid,
            last_seen=time.time_ns(),
        )
        producer.send(TOPICS.workers, worker, key=worker.worker_id)

    await until(lambda: len(scaler.pids) == 1)
    (first,) = scaler.pids
    report(77, 5, "elsewhere")  # overloaded: its two slots run five
    report(first, 2)
    await until(lambda: len(scaler.pids) == 3)  # of seven that run, two slots elsewhere take their part
    later = [pid for pid in scaler.pids if pid != first]
    commands = [(await asyncio.to_thread(Path(f"/proc/{pid}/cmdline").read_text)).split("\0") for pid in scaler.pids]
    assert [command[-3:-1] for command in commands] == [["--health-port", f"910{n}"] for n in (1, 2, 3)]
    assert all(command[-5] == "--drain-s" and float(command[-4]) > 10**7 for command in commands)
    report(77, 0, "elsewhere")
    report(first, 1)
    for pid in later:
        report(pid, 0)
    await until(lambda: scaler.pids == [first])
    stop.set()
    await asyncio.wait_for(running, 20)
    assert scaler.pids == []
