"""The load of a deployment, as autoscalers and Prometheus read it from the gateway."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from exposition import checked
from factories import task
from gateway_rig import serving

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.services.fleet_load import FleetLoadReader, LoadPolicy
from millstream.pipeline.services.gateway import GatewayPolicy
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import LogUnavailable
from millstream.schemas.wire.records import Worker
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", 2)


def worker(name: str, slots: int, running: int, *, ago_s: float = 0.0) -> Worker:
    now = time.time_ns()
    return Worker(
        worker_id=name,
        role="runner",
        host="h",
        version="1",
        slots=slots,
        running=running,
        started=now,
        last_seen=now - round(ago_s * 1e9),
    )


async def test_work_is_what_waits_and_what_runs_over_the_slots_of_living_runners() -> None:
    log = MemoryLog(TOPICS, encode=True)
    reader = FleetLoadReader(log, TOPICS, LoadPolicy(fresh_s=0.0))
    empty = await reader.read()
    assert empty.to_json() == {
        "work": 0,
        "unclaimed": {"high": 0, "normal": 0, "low": 0},
        "oldest_unclaimed_s": 0.0,
        "running": 0,
        "slots": 0,
        "load": None,
    }
    producer = log.producer()
    for of, priority in [(task(), "high"), (task(), "normal"), (task(), "normal")]:
        producer.send(TOPICS.tasks(priority), of)
    for one in (worker("a", 4, 4), worker("b", 4, 1), worker("dead", 8, 8, ago_s=60), worker("ended", 0, 0)):
        producer.send(TOPICS.workers, one, key=one.worker_id)
    found = (await reader.read()).to_json()
    assert found.pop("oldest_unclaimed_s") >= 0
    unclaimed = {"high": 1, "normal": 2, "low": 0}
    assert found == {"work": 8, "unclaimed": unclaimed, "running": 5, "slots": 8, "load": 1.0}


async def test_an_answer_is_given_again_while_it_is_fresh() -> None:
    log = MemoryLog(TOPICS, encode=True)
    reader = FleetLoadReader(log, TOPICS, LoadPolicy(fresh_s=60.0))
    first = await reader.read()
    log.producer().send(TOPICS.tasks("normal"), task())
    assert await reader.read() is first


async def test_many_that_ask_at_once_share_one_read_and_a_late_one_is_no_answer() -> None:
    class Slow(MemoryLog):
        asked = 0
        gate = asyncio.Event()

        def consumer(self, group: str | None = None):  # type: ignore[no-untyped-def]
            self.asked += group is not None
            made = super().consumer(group)
            ends = made.end_offsets

            async def gated(partitions):  # type: ignore[no-untyped-def]
                await self.gate.wait()
                return await ends(partitions)

            made.end_offsets = gated  # type: ignore[method-assign]
            return made

    log = Slow(TOPICS, encode=True)
    reader = FleetLoadReader(log, TOPICS, LoadPolicy(fresh_s=0.0, read_s=0.05))
    answers = await asyncio.gather(*(reader.read() for _ in range(5)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [LogUnavailable] * 5
    assert (log.asked, reader.last) == (1, None)
    log.gate.set()
    assert (await reader.read()).slots == 0


@pytest.mark.kafka
async def test_a_gateway_answers_with_the_load_and_exports_it(kafka_settings: Callable[..., Settings]) -> None:
    async with serving(kafka_settings(), GatewayPolicy(load=LoadPolicy(fresh_s=0.0))) as client:
        topics = client.settings.topics
        for n in range(3):
            assert (await client.post("/tasks?priority=low", {"input": n}))[0] == 202
        one = worker("r", 4, 2)
        await send_acknowledged(client.producer, topics.workers, one, key=one.worker_id)
        async with asyncio.timeout(30):
            while (answered := await client.get("/load"))[0] != 200:  # the group's coordinator may be starting
                assert answered[0] == 503
        load = answered[1]
        assert (load["work"], load["unclaimed"]["low"], load["load"]) == (5, 3, 1.25)
        samples = checked((await client.get("/metrics"))[1])
        assert samples["millstream_unclaimed_tasks"][(("priority", "low"),)] == 3
        assert samples["millstream_fleet_slots"] == {(): 4}
        assert samples["millstream_fleet_running"] == {(): 2}
        assert samples["millstream_oldest_unclaimed_seconds"][()] > 0
        assert not [name for name in samples if "rollouts" in name]  # counted once, where they end: at the adapter
        gone = replace(one, slots=0, running=0)
        await send_acknowledged(client.producer, topics.workers, gone, key=one.worker_id)
        assert (await client.get("/load"))[1]["load"] is None


@pytest.mark.kafka
async def test_without_an_answer_of_the_log_the_load_is_absent_and_not_old(
    kafka_settings: Callable[..., Settings],
) -> None:
    async with serving(kafka_settings(), GatewayPolicy(load=LoadPolicy(fresh_s=0.0, read_s=0.0))) as client:
        status, answer = await client.get("/load")
        assert (status, "can't be read" in answer["errors"][0]) == (503, True)
        status, text = await client.get("/metrics")
        assert status == 200
        assert "millstream_unclaimed_tasks" not in checked(text)
