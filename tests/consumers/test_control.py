"""Following the control topic."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from factories import task

from millstream.consumers.control import ControlFollower, ControlPolicy
from millstream.consumers.log.memory_log import MemoryLog
from millstream.producers.control import cancel_record, pause_record, publish_control, publish_resources
from millstream.producers.supervisor import supervised
from millstream.schemas.control import LLM, Arm, PromptTemplate, Resources, RoutingTable
from millstream.schemas.errors import Fenced, LogError, LogUnavailable, TransactionAborted
from millstream.schemas.ids import derived_id
from millstream.schemas.wire.records import Control
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", 2)


def version(number: int, experiment: str = "e") -> Resources:
    items = {"policy": LLM(model="policy", model_version=f"r.0.{number}"), "ask": PromptTemplate(template="{q}?")}
    return Resources(resources_id=derived_id(number * 10**9, experiment), experiment_id=experiment, items=items)


@pytest.fixture(params=[False, True], ids=["live", "encoded"])
def log(request: pytest.FixtureRequest) -> MemoryLog:
    return MemoryLog(TOPICS, encode=request.param)


@pytest.fixture
async def follower(log: MemoryLog) -> AsyncIterator[ControlFollower]:
    await publish_resources(log.producer(), TOPICS, version(1))
    follower = ControlFollower(log, TOPICS)
    await follower.start()
    yield follower
    await follower.close()


async def test_what_was_there_before_is_known_after_the_start(follower: ControlFollower) -> None:
    assert follower.latest("e") == version(1)
    assert follower.latest("another") is None


async def test_the_latest_of_an_experiment_and_pinned_versions(log: MemoryLog, follower: ControlFollower) -> None:
    producer = log.producer()
    await publish_resources(producer, TOPICS, version(3))
    await publish_resources(producer, TOPICS, version(2))  # announced late, but older
    await publish_resources(producer, TOPICS, version(9, ""))
    await follower.wait_until_current()
    assert follower.latest("e") == version(3)
    assert follower.pinned(version(2).resources_id) == version(2)
    assert follower.latest("another") == version(9, "")


async def test_the_last_record_of_a_key_holds_and_a_broken_one_is_left_out(
    log: MemoryLog, follower: ControlFollower, caplog: pytest.LogCaptureFixture
) -> None:
    producer = log.producer()
    for body in ("true", "false"):
        await publish_control(producer, TOPICS, Control(kind="pause", name="e", body=body, created_at=1))
    await publish_control(
        producer, TOPICS, Control(kind="resources", name="x", experiment_id="e", body="?", created_at=1)
    )
    producer.send(TOPICS.control, b"garbage", key="pause/e")
    deep = Control(kind="routing", name="~", body="[" * 100_000, created_at=1)  # no role may end of it
    await publish_control(producer, TOPICS, deep)
    await follower.wait_until_current()
    assert not follower.pauses
    assert follower.latest("e") == version(1)
    assert "ignoring t.control[0]@3: resources x" in caplog.text
    assert "ignoring t.control[0]@4" in caplog.text
    assert "ignoring t.control[0]@5: routing ~: ValueError" in caplog.text


def routing(**arm: Any) -> str:
    return json.dumps({"models": {"m": [{"version": "1", "upstream": "u", "served_as": "s"} | arm]}})


WRONG = {
    "weight as text": ("routing", routing(weight="1")),
    "no weight": ("routing", routing(weight=None)),
    "weight NaN": ("routing", routing(weight=float("nan"))),
    "weight below 0": ("routing", routing(weight=-1)),
    "no version": ("routing", routing(version=None)),
    "version as a number": ("routing", routing(version=1)),
    "an unknown field": ("routing", routing(share=1)),
    "no models": ("routing", "null"),
    "deep": ("routing", "[" * 300_000),
    "a model without a name": ("resources", '{"p": {"type": "llm", "model": null, "model_version": "1"}}'),
    "endpoints as text": ("resources", '{"p": {"type": "llm", "model": "m", "model_version": "1", "endpoints": "x"}}'),
    "a resource as a number": ("resources", '{"p": 5}'),
    "a type as a list": ("resources", '{"p": {"type": []}}'),
    "pause as text": ("pause", '"true"'),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_record_of_wrong_types_is_ignored_and_named(
    log: MemoryLog, follower: ControlFollower, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """A6: it ends no call and no role, now or at the next start."""
    kind, body = WRONG[what]
    arm = Arm(version="1", upstream="u", served_as="s", weight=1.0)
    good = RoutingTable(table_id="0", models={"m": (arm,)})
    await publish_control(log.producer(), TOPICS, good.to_control())
    await publish_control(log.producer(), TOPICS, Control(kind=kind, name="9", body=body, created_at=1))
    await follower.wait_until_current()
    successor = ControlFollower(log, TOPICS)
    await successor.start()
    for each in (follower, successor):
        assert each.routing.choose("m", "r") == arm
        assert each.latest("e") == version(1)
        assert not each.pauses
    await successor.close()
    assert [r.levelname for r in caplog.records if "ignoring t.control[0]@2" in r.message] == ["ERROR", "ERROR"]


class Refusing:
    """A log whose readers are refused while ``error`` is set, as Kafka does without the permission."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self.error: LogError | None = None
        self.refused = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def consumer(self, group: str | None = None) -> Any:
        consumer = self._log.consumer(group)
        for name in ("poll", "end_offsets"):
            setattr(consumer, name, self._refusable(getattr(consumer, name)))
        return consumer

    def _refusable(self, call: Any) -> Any:
        async def refusable(*args: Any) -> Any:
            if self.error is not None:
                self.refused.set()
                raise self.error
            return await call(*args)

        return refusable


@pytest.mark.parametrize("error", [LogError("denied"), LogUnavailable("away"), Fenced("?"), TransactionAborted("?")])
async def test_after_any_error_of_the_log_cancels_are_heard_again(error: LogError) -> None:
    """Section B1: one denied read must not end the follower."""
    log, heard = Refusing(MemoryLog(TOPICS)), asyncio.Event()
    follower = ControlFollower(log, TOPICS, heard.set, policy=ControlPolicy(retry_s=0.0))
    with supervised() as background:
        await follower.start()
        log.error = error
        await log.refused.wait()
        waiting = asyncio.create_task(follower.wait_until_current())
        await publish_control(log.producer(), TOPICS, cancel_record("group", "g1"))
        assert background.age_s > 0
        log.error = None
        async with asyncio.timeout(10):
            await heard.wait()
            await waiting
        assert background.failure is None
        await follower.close()


async def test_a_record_that_breaks_its_reader_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    def break_at_first(record: Control) -> None:
        if record.name.endswith("1"):
            raise RecursionError

    log, heard = MemoryLog(TOPICS), asyncio.Event()
    follower = ControlFollower(log, TOPICS, heard.set, break_at_first)
    await follower.start()
    for name in ("g1", "g2"):
        await publish_control(log.producer(), TOPICS, cancel_record("group", name))
    async with asyncio.timeout(10):
        await heard.wait()
    await follower.close()
    assert "ignoring t.control[0]@0" in caplog.text


async def test_what_is_kept_is_bounded() -> None:
    """Section F8: neither policy versions nor cancels are kept for ever; the latest of each experiment is."""
    log = MemoryLog(TOPICS)
    producer = log.producer()
    follower = ControlFollower(log, TOPICS, policy=ControlPolicy(versions=10, cancels=10))
    await publish_resources(producer, TOPICS, version(0, "quiet"))
    for number in range(50):
        await publish_resources(producer, TOPICS, version(number))
        await publish_control(producer, TOPICS, cancel_record("rollout", f"r{number}"))
        await publish_control(producer, TOPICS, pause_record(f"e{number}", True))
        await publish_control(producer, TOPICS, pause_record(f"e{number}", False))
    await follower.start()
    await follower.close()
    assert [n for n in range(50) if follower.pinned(version(n).resources_id)] == list(range(39, 50))
    assert follower.latest("quiet") == version(0, "quiet")
    cancelled = [n for n in range(50) if follower.cancelled(replace(task(), rollout_id=f"r{n}"))]
    assert cancelled == list(range(40, 50))
    assert not follower.pauses
