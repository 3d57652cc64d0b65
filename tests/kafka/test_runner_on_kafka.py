"""Runners on a real Kafka: what is claimed runs once, however many runners come and go."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from runner_rig import assert_whole, running, write_agent

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.schemas.config.settings import Settings

pytestmark = pytest.mark.kafka

AGENT = """
    import asyncio
    import millstream as ms

    async def agent(input):
        ms.emit_span("work", {"n": input})
        with open("ran", "a") as ledger:
            print(input, file=ledger)
        await asyncio.sleep(0.02)
        return 1.0
"""


async def test_two_runners_that_join_and_leave_run_every_task_once(
    tmp_path: Path, kafka_settings: Callable[..., Settings]
) -> None:
    settings = kafka_settings(proxy_url="", runner_processes=1, runner_concurrency=4)
    log = KafkaLog(settings)
    await log.create_topics()
    folder = write_agent(tmp_path, AGENT)
    async with running("my_agent:agent", folder, log=log, settings=settings) as rig:
        await rig.publish(range(40))
        await rig.ends(5)
        n, workers = 40, 1
        async with running("my_agent:agent", folder, log=log, settings=settings):
            while workers < 2:  # until both have a part of the partitions
                await rig.publish(range(n, n + 20), priority="low")
                n += 20
                workers = len({one.last.worker_id for one in (await rig.ends(n)).values()})
            await rig.publish(range(n, n + 20))
        n += 20
        ended = await rig.ends(n)
    assert_whole(ended)
    assert {one.last.status for one in ended.values()} == {"succeeded"}
    ran = await asyncio.to_thread((tmp_path / "ran").read_text)
    assert sorted(map(int, ran.split())) == list(range(n))
