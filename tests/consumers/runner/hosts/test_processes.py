"""Agent processes that crash or can't be started: who is blamed, who is retried, and when it is tried again."""

import asyncio
import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runner_rig import Rig, running, settings_for_tests, until, write_agent

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.hosts.port import HostPolicy
from millstream.consumers.runner.runner import Runner, RunnerPolicy
from millstream.schemas.errors import MillstreamError
from millstream.schemas.wire.records import RolloutEnd

CRASHES = """
    import asyncio, ctypes, os

    WAYS = {
        "exit": lambda: os._exit(7),
        "segfault": lambda: ctypes.string_at(0),
    }

    async def agent(input):
        await asyncio.sleep(0.2)
        if input in WAYS:
            WAYS[input]()
        return 1.0
"""


async def settled(rig: Rig, n: int) -> dict[str, RolloutEnd]:
    """The ends of ``n`` rollouts."""
    events = await rig.read_until(lambda events: sum(isinstance(e, RolloutEnd) for e in events) >= n)
    return {e.rollout_id: e for e in events if isinstance(e, RolloutEnd)}


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("exit", "failed: exit: the agent process exited with code 7"),
        ("segfault", "failed: signal: the agent process was killed by SIGSEGV"),
    ],
)
async def test_a_crash_costs_its_neighbours_a_retry_and_is_blamed_on_the_attempt_that_runs_alone(
    tmp_path: Path, way: str, reason: str
) -> None:
    folder = write_agent(tmp_path, CRASHES, "crashes.py")
    settings = settings_for_tests()
    log = MemoryLog(settings.topics)
    stop = asyncio.Event()
    adapter = asyncio.create_task(Adapter(log, settings.topics, transactional_id="adapter").run(stop))
    async with running("crashes:agent", folder, log=log, settings=settings, processes=1, concurrency=4) as rig:
        tasks = await rig.publish([way, *range(3)], max_attempts=1)
        ends = await settled(rig, 4)
    stop.set()
    await adapter
    bad = ends[tasks[0].rollout_id]
    assert (bad.status, bad.reason) == ("failed", reason)
    assert bad.lost_attempts in (1, 2)  # before it was known
    assert [ends[task.rollout_id].status for task in tasks[1:]] == ["succeeded"] * 3
    assert max(ends[task.rollout_id].lost_attempts for task in tasks[1:]) <= 2


async def test_suspects_run_alone_one_per_process_and_may_be_cancelled(tmp_path: Path) -> None:
    code = """
        import asyncio, os
        async def agent(input):
            await asyncio.sleep(0.05)
            return os.getpid()
    """
    folder = write_agent(tmp_path, code, "alone.py")
    async with running("alone:agent", folder, processes=2, concurrency=4) as rig:
        tasks = await rig.publish(range(5))
        first = await rig.ends(5)
        await rig.publish_tasks([replace(t, crashes=2, attempt=2, input=f"{n + 10}") for n, t in enumerate(tasks)])
        ended = await rig.ends(10)
        await rig.publish([100])  # the others' slots are still there
        assert (await rig.ends(11))["100"].last.status == "succeeded"
    usual = {one.last.output for one in first.values()}
    alone = [ended[f"{n + 10}"].last.output for n in range(5)]
    assert len(set(alone)) == 5
    assert not usual & set(alone)


class Forks:
    """Fails the next starts of a process with this error number, as a machine without room for it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures: list[int] = []
        self.tries = 0
        start = asyncio.create_subprocess_exec

        async def create(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
            self.tries += 1
            if self.failures:
                code = self.failures.pop()
                raise OSError(code, os.strerror(code))
            return await start(*arguments, **options)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", create)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE])
async def test_a_process_that_can_not_be_started_now_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """One failed fork leaves no runner without processes; meanwhile it counts as starving."""
    folder = write_agent(tmp_path, CRASHES, "crashes.py")
    forks = Forks(monkeypatch)
    settings = settings_for_tests()
    rig, stop = Rig(MemoryLog(settings.topics), settings), asyncio.Event()
    policy = RunnerPolicy(host=HostPolicy(start_backoff_s=(0.3, 0.3)))
    runner = Runner(rig.log, settings, "crashes:agent", folder=folder, processes=1, concurrency=1, policy=policy)
    forks.failures = [code]  # also at the start
    rig.runner = asyncio.create_task(runner.run(stop))
    await rig.publish([0])
    assert [one.last.status for one in (await rig.ends(1)).values()] == ["succeeded"]
    assert runner.starving_s == 0.0
    forks.failures = [code, code]
    await rig.publish(["exit"])
    await until(lambda: runner.starving_s > 0)
    await rig.publish([1])
    ended = await rig.ends(3)
    assert ended["1"].last.status == "succeeded"
    assert runner.starving_s == 0.0
    assert forks.tries == 5
    stop.set()
    await rig.runner


async def test_a_process_that_can_never_be_started_ends_the_runner_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_agent(tmp_path, CRASHES, "crashes.py")
    forks = Forks(monkeypatch)
    forks.failures = [errno.EACCES]
    with pytest.raises(MillstreamError, match=r"can be started for agent crashes:agent: .*Permission denied"):
        async with running("crashes:agent", folder, processes=1):
            pass
