"""Who works, and how much waits."""

import asyncio
from pathlib import Path

from runner_rig import Rig, running, settings_for_tests, write_agent

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.runner import RunnerPolicy
from millstream.consumers.unclaimed import UnclaimedTasks
from millstream.consumers.workers import is_alive, read_workers

WAITS = """
    import asyncio
    async def agent(input):
        await asyncio.sleep(60)
"""


async def test_a_runner_tells_what_it_does_and_that_it_has_ended(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, WAITS, "waits.py")
    settings = settings_for_tests()
    topics = settings.topics
    rig = Rig(MemoryLog(topics, encode=True), settings)
    await rig.publish(range(6))
    await rig.publish([6], priority="low")
    assert (await UnclaimedTasks(rig.log, topics).read()).tasks == {"high": 0, "normal": 6, "low": 1}
    options = {
        "log": rig.log,
        "settings": settings,
        "worker_id": "w",
        "drain_s": 0.0,
        "policy": RunnerPolicy(report_s=0.05),
    }
    async with running("waits:agent", folder, processes=2, concurrency=2, **options):
        async with asyncio.timeout(20):
            while not (found := await read_workers(rig.log, topics)) or found[0].running < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        (worker,) = found
        assert (worker.worker_id, worker.role, worker.slots, worker.running) == ("w", "runner", 4, 4)
        assert is_alive(worker, worker.last_seen + 10**9)
        assert not is_alive(worker, worker.last_seen + 30 * 10**9)
        assert sum((await UnclaimedTasks(rig.log, topics).read()).tasks.values()) == 3
    (worker,) = await read_workers(rig.log, topics)
    assert (worker.slots, worker.running) == (0, 0)
    assert worker.last_seen > worker.started
