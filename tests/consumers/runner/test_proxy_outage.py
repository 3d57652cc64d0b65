"""An outage of the only proxy: tasks wait for it, and none is lost for good."""

import asyncio
import threading
from pathlib import Path

from runner_rig import WAIT_S, Rig, settings_for_tests, until

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.runner.proxies import ProxiesPolicy
from millstream.consumers.runner.runner import Runner, RunnerPolicy
from millstream.pipeline.addresses import free_port
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd

POLICY = RunnerPolicy(poll_s=0.02, proxies=ProxiesPolicy(probe_s=0.05))


async def test_nothing_fails_while_the_only_proxy_is_away_and_everything_ends_when_it_is_back(tmp_path: Path) -> None:
    """The runner claims nothing meanwhile, and what ran when the proxy went away costs no budget."""
    url = f"http://127.0.0.1:{free_port()}"
    settings = settings_for_tests(proxy_url=url, blob_url=f"file://{tmp_path}")
    rig, stop, go = Rig(MemoryLog(settings.topics), settings), asyncio.Event(), threading.Event()
    begun = threading.Semaphore(0)

    def agent(number: int) -> float:
        begun.release()
        go.wait(WAIT_S)
        return 1.0

    runner = Runner(rig.log, settings, agent, concurrency=4, policy=POLICY)
    adapter = Adapter(rig.log, settings.topics, transactional_id="adapter")
    roles = [asyncio.create_task(runner.run(stop)), asyncio.create_task(adapter.run(stop))]
    await rig.publish(range(12), max_lost_attempts=0)
    await until(lambda: runner.trouble is not None)  # nothing listens yet
    assert url in (runner.trouble or "")
    assert await rig.everything() == []
    async with serve(Proxy(rig.log, settings).app, url, shutdown_s=0.1):
        for _ in range(4):
            assert await asyncio.to_thread(begun.acquire, timeout=WAIT_S)
        assert runner.trouble is None
    go.set()  # the attempts end while there is no proxy
    await until(lambda: not runner.load()[1])
    await until(lambda: runner.trouble is not None)
    assert runner.proxy_away_s > 0
    before = await rig.everything()
    # Four ran; up to four more may have begun before the first of them could not be closed.
    lost = {e.rollout_id for e in before if isinstance(e, AttemptEvent) and e.status == "lost"}
    assert 4 <= len(lost) <= 8
    assert not any(isinstance(e, RolloutEnd) for e in before)
    async with serve(Proxy(rig.log, settings).app, url, shutdown_s=0.1):
        events = await rig.read_until(lambda events: sum(isinstance(e, RolloutEnd) for e in events) >= 12)
        stop.set()
        await asyncio.gather(*roles)
    ends = [e for e in events if isinstance(e, RolloutEnd)]
    assert [end.status for end in ends] == ["succeeded"] * 12
    assert {end.rollout_id: end.lost_attempts for end in ends if end.lost_attempts} == dict.fromkeys(lost, 1)
