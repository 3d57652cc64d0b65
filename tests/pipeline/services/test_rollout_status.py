"""The status of a rollout: the fold over its records, and where they are read from."""

import time
from dataclasses import replace
from typing import Any

from factories import event, span, task

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.services.rollout_status import describe_rollout, read_rollout_status
from millstream.schemas.ids import derived_id
from millstream.schemas.wire.records import RolloutEnd, RolloutTask
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", 4)


def end(of: RolloutTask, **fields: Any) -> RolloutEnd:
    defaults: dict[str, Any] = {
        "rollout_id": of.rollout_id,
        "group_id": of.group_id,
        "group_size": 1,
        "mode": of.mode,
        "status": "succeeded",
        "attempts": 1,
        "created_at": of.created_at,
        "started_at": of.created_at,
        "ended_at": of.created_at,
    }
    return RolloutEnd(**defaults | fields)


def test_a_rollouts_status_follows_its_records() -> None:
    first = task(mode="val")
    second = replace(first, attempt=2)
    steps = [
        (event(first, "a1", "preparing"), "running"),
        (event(first, "a1", "failed"), "running"),
        (event(first, "a1", "retry"), "retrying"),
        (event(first, "a1", "running"), "retrying"),  # a zombie
        (event(second, "a2", "preparing"), "running"),
        (end(first, reward=1.5), "succeeded"),
        (event(second, "a2", "failed"), "succeeded"),  # late
    ]
    assert describe_rollout([first])["status"] == "queued"
    records = [record for record, _ in steps]
    assert [describe_rollout(records[: n + 1])["status"] for n in range(len(steps))] == [wanted for _, wanted in steps]
    found = describe_rollout(records)
    assert (found["mode"], found["group_id"], found["reward"]) == ("val", first.group_id, 1.5)
    assert [(a["attempt_id"], a["status"]) for a in found["attempts"]] == [("a1", "retry"), ("a2", "preparing")]


def test_an_attempt_shows_its_last_change_and_its_error() -> None:
    one = task()
    beats = [event(one, "a", "running", time=n) for n in range(5)]
    (attempt,) = describe_rollout([event(one, "a", "preparing"), *beats])["attempts"]
    assert (attempt["status"], attempt["time"], attempt["error"]) == ("running", 0, None)
    (attempt,) = describe_rollout([event(one, "a", "preparing"), *beats, event(one, "a", "failed")])["attempts"]
    assert (attempt["status"], attempt["error"]) == ("failed", "ValueError: no")


async def test_it_is_read_from_the_rollouts_own_partition_or_from_the_tasks() -> None:
    log, one, other = MemoryLog(TOPICS, encode=True), task(experiment_id="e"), task()
    producer = log.producer()
    producer.send(TOPICS.tasks("low"), other)
    producer.send(TOPICS.tasks("low"), one)
    queued = await read_rollout_status(log, TOPICS, one.rollout_id)
    assert queued is not None
    assert (queued["status"], queued["experiment_id"], queued["attempts"]) == ("queued", "e", [])
    producer.send(TOPICS.events, event(one, "a", "preparing"), key=one.rollout_id)
    producer.send(TOPICS.events, b"garbage", key=one.rollout_id)
    producer.send(TOPICS.events, span(one, "a"), key=one.rollout_id)
    producer.send(TOPICS.events, event(other, "b", "preparing"), key=one.rollout_id)  # of another rollout
    running = await read_rollout_status(log, TOPICS, one.rollout_id)
    assert running is not None
    assert (running["status"], running["experiment_id"], len(running["attempts"])) == ("running", "e", 1)
    assert await read_rollout_status(log, TOPICS, task().rollout_id) is None


async def test_an_id_without_a_time_is_found_and_one_of_the_future_is_not_looked_for() -> None:
    log, named = MemoryLog(TOPICS, encode=True), task(rollout_id="mine")
    future = task(rollout_id=derived_id(time.time_ns() + 3600 * 10**9, "x"))
    for one in (named, future):
        log.producer().send(TOPICS.events, event(one, "a", "preparing"), key=one.rollout_id)
    assert await read_rollout_status(log, TOPICS, "mine") is not None
    assert await read_rollout_status(log, TOPICS, future.rollout_id) is None  # reading begins at the time in the id
