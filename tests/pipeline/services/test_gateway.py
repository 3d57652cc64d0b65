"""The gateway over HTTP, with a real Kafka behind it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from factories import event, task
from gateway_rig import Client, serving

from millstream.consumers.control import ControlFollower
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.services.gateway import GatewayPolicy
from millstream.pipeline.ui.gate import check_open
from millstream.producers.log.acks import send_acknowledged
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import RolloutEnd, RolloutTask

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
    _, queued = await client.get(path)
    assert (queued["status"], queued["experiment_id"], queued["attempts"]) == ("queued", "e", [])
    await client.send(event(one, "a", "preparing"), event(one, "a", "running"))
    assert (await client.get(path))[1]["status"] == "running"
    await client.send(event(one, "a", "succeeded"), ended(one, reward=0.5, experiment_id="e"))
    _, found = await client.get(path)
    assert (found["status"], found["reward"]) == ("succeeded", 0.5)


@kafka
async def test_a_bad_request_is_answered_with_its_problems(client: Client) -> None:
    too_large = [{"input": 1}, {"input": "x" * (1 << 20)}]
    for path, body, http_status, problem in [
        ("/tasks", {}, 422, {"index": 0, "field": "input", "message": "Field required"}),
        ("/tasks", [{"input": 1}, {"input": 1, "timeout_s": -1}], 422, {"index": 1, "field": "timeout_s"}),
        ("/tasks", [{"input": 1, "mode": "trian"}, 5], 422, {"index": 0, "field": "mode"}),
        ("/tasks", {"input": 1, "metadata": {"a": 1}}, 422, {"index": 0, "field": "metadata.a"}),
        ("/tasks", {"input": 1, "inptu": 1}, 422, {"index": 0, "field": "inptu"}),
        ("/tasks", too_large, 422, {"index": 1, "field": "input"}),
        ("/tasks?group_size=0", {"input": 1}, 422, {"field": "group_size"}),
        ("/tasks?group_size=10000", [{"input": 1}] * 2000, 422, {"field": "group_size"}),
        ("/tasks?group_size=3000", {"input": "x" * 100_000}, 413, {}),
        ("/tasks", {"input": 1, "max_attempts": 10**9}, 422, {"field": "max_attempts"}),
        ("/tasks", {"input": 1, "max_lost_attempts": 10**9}, 422, {"field": "max_lost_attempts"}),
        ("/tasks", [{"input": 1}, {"input": 1, "seed": 2**70}], 422, {"index": 1}),
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
    cancelled = task(rollout_id="r", group_id="g", experiment_id="e")
    for body in ({"experiment": "e"}, {"group": "g"}, {"rollout": "r"}):
        assert await client.post("/cancel", body) == (202, {"cancelled": body})
        await control.wait_until_current()
        assert control.cancelled(cancelled) == " ".join(next(iter(body.items())))
    for path, paused in [("/pause", True), ("/resume", False)]:
        assert await client.post(path, {"experiment": "p"}) == (202, {"experiment": "p", "paused": paused})
        await control.wait_until_current()
        assert control.waits(task(experiment_id="p")) is paused
    await control.close()


@kafka
async def test_an_unreadable_record_does_not_hide_a_rollout(client: Client) -> None:
    one = task(rollout_id=new_id())
    topic = client.settings.topics.events
    await client.send(event(one, "a", "preparing"))
    await send_acknowledged(client.producer, topic, b"garbage", key=one.rollout_id, headers={"h": b"\xff"})
    await client.send(event(one, "a", "running"))
    http_status, found = await client.get(f"/rollouts/{one.rollout_id}")
    assert (http_status, found["status"], found["attempts"][0]["status"]) == (200, "running", "running")


@kafka
async def test_kafka_that_does_not_answer_in_time_is_a_503(kafka_settings: MakeSettings) -> None:
    async with serving(kafka_settings(), GatewayPolicy(status_s=0.0, ready_s=0.0)) as client:
        assert (await client.get("/readyz"))[0] == 503
        http_status, answer = await client.get(f"/rollouts/{new_id()}")
        assert (http_status, "can't be read in time" in answer["errors"][0]) == (503, True)


@kafka
async def test_probes_and_metrics(client: Client) -> None:
    assert await client.get("/readyz") == (200, {"status": "ok"})
    assert (await client.get("/livez"))[0] == 200
    assert "millstream_poll_age_seconds" in (await client.get("/metrics"))[1]


@kafka
async def test_the_description_names_every_topic_with_its_records(client: Client) -> None:
    """Section F7: as JSON, without a page that loads scripts from elsewhere into an origin that may publish."""
    answered, page = await client.get("/asyncapi.json")
    assert answered == 200
    text = str(page["channels"])
    for topic in client.settings.topics.all:
        assert topic.name in text
        assert topic.key in text
    assert {"AttemptEvent", "RolloutTask", "RolloutEnd", "Triplet", "Span", "Worker", "Control", "DeadLetter"} <= set(
        page["components"]["schemas"]
    )
    assert "lease_s" in page["components"]["schemas"]["RolloutTask"]["properties"]
    assert (await client.get("/asyncapi"))[0] == 404


@kafka
async def test_the_token_is_required(kafka_settings: MakeSettings) -> None:
    async with serving(kafka_settings(gateway_token="s3cret")) as client:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            for path in ("/metrics", "/asyncapi.json", "/rollouts/r"):
                answered, answer = await client.get(path, **given)
                assert (answered, "gateway_token" in str(answer)) == (401, True)
        assert (await client.get("/metrics", Host="gateway/livez?"))[0] in (400, 401)
        assert (await client.get("/metrics", Authorization="Bearer s3cret"))[0] == 200
        assert (await client.get("/livez"))[0] == 200
        assert (await client.get("/metrics", Authorization="Bearer s3cret", Host="gateway.example"))[0] == 200


@kafka
async def test_without_a_token_only_requests_to_this_machine_are_answered(client: Client) -> None:
    assert (await client.get("/metrics", Host="rebound.example:8600"))[0] == 403
    assert (await client.get("/metrics", Host="localhost:8600"))[0] == 200
    assert (await client.get("/metrics", Host="[::1]:8600"))[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "gateway.example"])
def test_other_machines_need_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="MILLSTREAM_GATEWAY_TOKEN"):
        check_open(load_settings(), host)
    check_open(load_settings(gateway_token="t"), host)
