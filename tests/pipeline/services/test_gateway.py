"""The monitor over HTTP, with a real Kafka behind it."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from factories import event, task
from gateway_rig import Client, monitored

from millstream.consumers.control import ControlFollower
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.addresses import free_port
from millstream.pipeline.services import health as health_module
from millstream.pipeline.services.gateway import serve_monitor
from millstream.producers.log.port import send_acknowledged
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import RolloutEnd, RolloutTask, Worker

MakeSettings = Callable[..., Settings]
kafka = pytest.mark.kafka


async def read(log: KafkaLog, topic: str, count: int) -> list[RolloutTask]:
    consumer = log.consumer()
    await consumer.assign([Partition(topic, n) for n in range(4)])
    found: list[RolloutTask] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            batch = await consumer.poll(100, 0.2)
            found += [codec.decode_as(RolloutTask, r.value) for r in batch if isinstance(r, LogRecord)]
    await consumer.close()
    return found


def ended(of: RolloutTask, **fields: Any) -> RolloutEnd:
    return RolloutEnd(
        rollout_id=of.rollout_id,
        group_id=of.group_id,
        group_size=1,
        status="succeeded",
        attempts=1,
        created_at=of.created_at,
        started_at=of.created_at,
        ended_at=of.created_at + 1_000_000_000,
        **fields,
    )


@kafka
async def test_what_is_published_can_be_followed_to_its_end(client: Client) -> None:
    http_status, answer = await client.post(
        "/tasks?experiment=e&group_size=2&priority=high",
        [{"input": {"q": 1}}, {"input": "two", "priority": "low", "metadata": {"a": "b"}}],
    )
    assert http_status == 202
    ids = answer["published"]
    high, low = [await read(client.log, client.settings.topics.tasks(p), 2) for p in ("high", "low")]
    assert {(t.rollout_id, t.group_id) for t in high + low} == {(a["rollout_id"], a["group_id"]) for a in ids}
    assert {(t.input, t.experiment_id, t.group_size) for t in high} == {('{"q": 1}', "e", 2)}
    assert {t.metadata["a"] for t in low} == {"b"}  # type: ignore[index]

    one = high[0]
    path = f"/rollouts/{one.rollout_id}"
    queued = await client.until(path, lambda a: "status" in a)
    assert (queued["status"], queued["experiment_id"], queued["attempts"]) == ("queued", "e", [])
    await client.send(event(one, "a", "preparing"), event(one, "a", "running"))
    await client.until(path, lambda a: a["status"] == "running")
    await client.send(event(one, "a", "succeeded"), ended(one, reward=0.5, experiment_id="e"))
    assert (await client.until(path, lambda a: a["status"] == "succeeded"))["reward"] == 0.5

    _, kpis = await client.get("/kpis")
    assert (kpis["rollouts"], kpis["success_rate"], kpis["latency_s"]["p99"]) == (1, 1.0, 1.0)
    assert kpis["groups"][0]["experiment"] == "e"
    _, metrics = await client.get("/metrics")
    assert 'millstream_rollouts_ended_total{mode="train",status="succeeded"} 1.0' in metrics
    assert 'millstream_latency_seconds{quantile="0.99"} 1.0' in metrics


@kafka
async def test_a_request_that_is_wrong_is_told_what_is_wrong(client: Client) -> None:
    too_large = [{"input": 1}, {"input": "x" * (1 << 20)}]
    for path, body, http_status, problem in [
        ("/tasks", {}, 422, {"index": 0, "field": "input", "message": "Field required"}),
        ("/tasks", [{"input": 1}, {"input": 1, "timeout_s": -1}], 422, {"index": 1, "field": "timeout_s"}),
        ("/tasks", [{"input": 1, "mode": "trian"}, 5], 422, {"index": 0, "field": "mode"}),
        ("/tasks", {"input": 1, "metadata": {"a": 1}}, 422, {"index": 0, "field": "metadata.a"}),
        ("/tasks", {"input": 1, "inptu": 1}, 422, {"index": 0, "field": "inptu"}),
        ("/tasks", too_large, 422, {"index": 1, "field": "input"}),
        ("/tasks?group_size=0", {"input": 1}, 422, {"field": "group_size"}),
        ("/tasks?priority=urgent", {"input": 1}, 422, {"field": "priority"}),
        ("/cancel", {"rollout": "r", "group": "g"}, 422, {"field": ""}),
        ("/cancel", {"rollout": 5}, 422, {"field": "rollout"}),
        ("/cancel", {"runner": "r"}, 422, {"field": "runner.[key]"}),
        ("/cancel", {}, 422, {"field": ""}),
        ("/cancel", {"group": "\ud800"}, 422, {}),
        ("/pause", {"experiment": ""}, 422, {"field": "experiment"}),
    ]:
        answered, answer = await client.post(path, body)
        assert answered == http_status, (path, answer)
        if problem:
            assert problem.items() <= answer["errors"][0].items()
    for content_type, http_status, says in [("application/json", 400, "not JSON"), ("text/plain", 415, "Content-Type")]:
        async with client.http.post("/tasks", data=b"{", headers={"Content-Type": content_type}) as refused:
            assert refused.status == http_status
            assert says in await refused.text()
    answered, answer = await client.get("/rollouts/nobody")
    assert (answered, "nobody" in answer["errors"][0]) == (404, True)
    assert (await client.get("/tasks"))[0] == 405
    assert (await client.get("/else"))[0] == 404
    tasks = [Partition(client.settings.topics.tasks(p), n) for p in ("high", "normal", "low") for n in range(4)]
    consumer = client.log.consumer()
    assert set((await consumer.end_offsets(tasks)).values()) == {0}  # nothing of all that was published
    await consumer.close()


@kafka
async def test_cancel_and_pause_reach_the_control_topic(client: Client) -> None:
    control = ControlFollower(client.log, client.settings.topics)
    await control.start()
    for body, name in [({"rollout": "r"}, "rollout:r"), ({"group": "g"}, "group:g"), ({"experiment": "e"}, None)]:
        assert await client.post("/cancel", body) == (202, {"cancelled": body})
        await control.wait_until_current()
        assert control.get("cancel", name or "experiment:e") is not None
    for path, paused in [("/pause", True), ("/resume", False)]:
        assert await client.post(path, {"experiment": "e"}) == (202, {"experiment": "e", "paused": paused})
        await control.wait_until_current()
        record = control.get("pause", "e")
        assert record is not None
        assert record.body == str(paused).lower()
    await control.close()


@kafka
async def test_it_knows_what_was_there_before_it_and_survives_what_it_can_not_read(
    kafka_settings: MakeSettings,
) -> None:
    settings = kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    producer, one = log.producer(), task()
    now = one.created_at
    runner = Worker(
        worker_id="w", role="runner", host="h", version="1", slots=4, running=1, started=0, last_seen=1 << 62
    )
    await send_acknowledged(producer, settings.topics.tasks("normal"), one, partition=0)
    await send_acknowledged(producer, settings.topics.events, event(one, "a", "preparing"), key=one.rollout_id)
    await send_acknowledged(producer, settings.topics.events, b"garbage", key=one.rollout_id, headers={"h": b"\xff"})
    await send_acknowledged(producer, settings.topics.workers, runner, key="w")
    await asyncio.to_thread(producer.close)
    async with monitored(settings) as client:
        found = await client.until(f"/rollouts/{one.rollout_id}", lambda a: a.get("status") == "running")
        assert found["attempts"][0]["time"] == now + 5
        assert (await client.until("/kpis", lambda a: a["slots"] > 0))["utilisation"] == 0.25
        await client.send(ended(one))
        await client.until(f"/rollouts/{one.rollout_id}", lambda a: a["status"] == "succeeded")
        consumer = client.log.consumer()
        dead = Partition(settings.topics.dead, 0)
        assert await consumer.end_offsets([dead]) == {dead: 0}  # that is for those whose record it was
        await consumer.close()


@kafka
async def test_it_is_alive_for_as_long_as_it_polls(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.timeout(10):
        while not client.health.poll_age:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert (await client.get("/livez"))[0] == 200
    assert "millstream_poll_age_seconds" in (await client.get("/metrics"))[1]
    monkeypatch.setattr(health_module, "STUCK_S", 0.0)
    assert (await client.get("/livez"))[0] == 503


@kafka
async def test_the_page_shows_every_topic_with_its_records(client: Client) -> None:
    _, page = await client.get("/asyncapi.json")
    text = str(page["channels"])
    for topic in client.settings.topics.all:
        assert topic.name in text
        assert topic.key in text
    assert {"AttemptEvent", "RolloutTask", "RolloutEnd", "Triplet", "Span", "Worker", "Control", "DeadLetter"} <= set(
        page["components"]["schemas"]
    )
    assert "lease_s" in page["components"]["schemas"]["RolloutTask"]["properties"]
    answered, html = await client.get("/asyncapi")
    assert (answered, "<html" in html.lower()) == (200, True)


@kafka
async def test_a_token_is_asked_for(kafka_settings: MakeSettings) -> None:
    async with monitored(kafka_settings(monitor_token="s3cret")) as client:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            for path in ("/kpis", "/metrics", "/asyncapi.json", "/rollouts/r"):
                answered, answer = await client.get(path, **given)
                assert (answered, "monitor_token" in str(answer)) == (401, True)
        assert (await client.get("/kpis", Host="monitor/livez?"))[0] in (400, 401)
        assert (await client.get("/kpis", Authorization="Bearer s3cret"))[0] == 200
        assert (await client.get("/livez"))[0] == 200
        assert (await client.get("/kpis", Authorization="Bearer s3cret", Host="monitor.example"))[0] == 200


@kafka
async def test_without_a_token_only_this_machine_is_answered(client: Client) -> None:
    assert (await client.get("/kpis", Host="rebound.example:8600"))[0] == 403
    assert (await client.get("/kpis", Host="localhost:8600"))[0] == 200
    assert (await client.get("/kpis", Host="[::1]:8600"))[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "monitor.example"])
async def test_others_are_not_let_in_without_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="MILLSTREAM_MONITOR_TOKEN"):
        await serve_monitor(load_settings(), host, 0)


@kafka
async def test_the_command_serves_until_it_is_told_to_stop(kafka_settings: MakeSettings) -> None:
    settings, port = kafka_settings(), free_port()
    log = KafkaLog(settings)
    await log.create_topics()
    environment = os.environ | {
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_KAFKA_PARTITIONS": "4",
        "MILLSTREAM_MONITOR_TOKEN": "t",
    }
    arguments = ["-m", "millstream.pipeline", "monitor", "--host", "0.0.0.0", "--port", str(port)]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, env=environment)
    try:
        headers = {"Authorization": "Bearer t"}
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=headers) as http, asyncio.timeout(40):
            while True:
                try:
                    async with http.get("/readyz") as ready:
                        if ready.status == 200:
                            break
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.05)
            async with http.post("/tasks", json={"input": 1}) as published:
                assert published.status == 202
        assert len(await read(log, settings.topics.tasks("normal"), 1)) == 1
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
