"""What a runner counts."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from exposition import checked, text_of
from prometheus_client import CollectorRegistry
from runner_rig import WAIT_S, Rig, settings_for_tests, terminal, until, write_agent

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.hosts.usage import usage_of
from millstream.consumers.runner.runner import Runner
from millstream.pipeline.services.health import Health
from millstream.producers.agent.emit import emit_reward
from millstream.schemas.wire.topics import Topics

ENDS = """
    import os
    import millstream as ms

    def agent(how):
        ms.emit_reward(0.5)
        ms.emit_reward(0.5)
        if how == "raise":
            raise ValueError("no")
        if how == "exit":
            os._exit(7)
        if how == "work":
            sum(n * n for n in range(3_000_000))
        return 1.0
"""


@asynccontextmanager
async def counted(agent: Any, folder: Path, **options: Any) -> AsyncIterator[tuple[Rig, Runner, CollectorRegistry]]:
    settings, registry, stop = settings_for_tests(), CollectorRegistry(), asyncio.Event()
    rig = Rig(MemoryLog(settings.topics, encode=True), settings)
    runner = Runner(rig.log, settings, agent, folder=folder, registry=registry, **options)
    rig.runner = asyncio.create_task(runner.run(stop))
    try:
        yield rig, runner, registry
    finally:
        stop.set()
        await asyncio.wait_for(rig.runner, WAIT_S)


def by(samples: dict[str, Any], name: str, label: str) -> dict[str, float]:
    return {dict(labels)[label]: value for labels, value in samples.get(f"millstream_{name}", {}).items()}


async def test_attempts_spans_and_processes_are_counted_by_how_they_end(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, ENDS, "ends.py")
    async with counted("ends:agent", folder, processes=1, concurrency=1, instrument="none") as (rig, runner, registry):
        await rig.publish(["return", "raise", "exit", "return"], max_attempts=1)
        await rig.read_until(lambda events: len(terminal(events)) == 4)
        await until(lambda: not runner.load()[1])
        used = runner.agents_usage()
    assert used is not None
    assert used.cpu_s > 0.01
    assert used.resident_bytes > 1 << 20
    samples = checked(text_of(registry))
    assert by(samples, "attempts_total", "status") == {"succeeded": 2, "failed": 2}
    assert samples["millstream_attempt_seconds_count"] == {(): 4}
    assert 0 < samples["millstream_attempt_seconds_sum"][()] < 4 * WAIT_S
    assert by(samples, "spans_total", "source")["agent"] == sum(n or 0 for n in spans_of(rig))
    assert by(samples, "agent_processes_ended_total", "reason") == {"exit": 1, "stopped": 1}


def spans_of(rig: Rig) -> list[int]:
    """By attempt: what its end says."""
    from millstream.schemas.wire import codec

    return [event.span_counts.get("agent", 0) for event in terminal(codec.decode(r.value) for r in rig.records)]


async def test_the_cpu_time_of_agents_never_falls_when_one_ends(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, ENDS, "ends.py")
    seen = []
    options = {"processes": 1, "concurrency": 1, "max_attempts_per_process": 1, "instrument": "none"}
    async with counted("ends:agent", folder, **options) as (rig, runner, registry):
        for n in range(1, 4):
            await rig.publish(["work"])
            await rig.read_until(lambda events, n=n: len(terminal(events)) == n)
            seen.append(runner.agents_usage().cpu_s)
        await until(lambda: by(checked(text_of(registry)), "agent_processes_ended_total", "reason") == {"stopped": 3})
        seen.append(runner.agents_usage().cpu_s)
    seen.append(runner.agents_usage().cpu_s)
    assert seen == sorted(seen)
    assert seen[-1] - seen[0] > 0.05


async def test_agents_in_threads_have_no_processes_and_no_series_twice(tmp_path: Path) -> None:
    async def agent(_: Any) -> float:
        emit_reward(1.0)
        return 1.0

    async with counted(agent, tmp_path, concurrency=2, instrument="none") as (rig, runner, registry):
        health = Health(rig.log.polls, asyncio.Event())
        health.registry.register(runner)
        await rig.publish(range(3))
        await rig.read_until(lambda events: len(terminal(events)) == 3)
        await until(lambda: not runner.load()[1])
        assert runner.agents_usage() is None
        samples = checked(text_of(health.registry))
    assert len(samples["process_cpu_seconds_total"]) == 1
    assert by(checked(text_of(registry)), "attempts_total", "status") == {"succeeded": 3}


async def test_a_heartbeat_is_not_younger_than_now(tmp_path: Path) -> None:
    """Defect 7: an idle runner exported −3e-06."""
    settings = settings_for_tests()
    runner = Runner(MemoryLog(settings.topics), settings, print)
    assert [runner.heartbeat_age_s for _ in range(1000)] == [0.0] * 1000


async def test_dead_letters_of_a_runner_are_counted_by_reason(tmp_path: Path) -> None:
    async with counted(print, tmp_path, instrument="none") as (rig, _, registry):
        topics: Topics = rig.settings.topics
        rig.log.producer().send(topics.tasks("normal"), b"garbage", key="k")
        expected = {(("reason", "undecodable"), ("role", "runner")): 1}
        await until(lambda: checked(text_of(registry)).get("millstream_dead_letters_total") == expected)


def test_what_a_process_uses_that_has_ended_is_nothing_more() -> None:
    used = usage_of([2**22 + 1])  # no process has this id: Linux's are below 2**22
    assert used.resident_bytes == 0
    assert math.isfinite(used.cpu_s)
