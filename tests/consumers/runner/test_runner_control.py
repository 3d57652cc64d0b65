"""Cancelling and pausing through the control topic."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from runner_rig import Rig, assert_whole, by_input, running, settings_for_tests, terminal, write_agent

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Consumer
from millstream.consumers.runner.runner import RunnerPolicy
from millstream.producers.control import cancel_record, pause_record, publish_control
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.records import AttemptEvent, Control, Span
from millstream.schemas.wire.topics import Topics

MODES = pytest.mark.parametrize("processes", [0, 1], ids=["threads", "process"])

SLOW = """
    import asyncio
    import millstream as ms

    async def asleep(input):
        ms.emit_span("began")
        try:
            await asyncio.sleep(60 if input == "slow" else 0)
        except asyncio.CancelledError:
            ms.emit_span("cancelled")
            raise
        return 1.0

    async def stubborn(input):
        ms.emit_span("began")
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
"""


async def say(rig: Rig, record: Control) -> None:
    await publish_control(rig.log.producer(), rig.settings.topics, record)


async def begun(rig: Rig, n: int) -> None:
    await rig.read_until(lambda events: sum(isinstance(e, Span) and e.name == "began" for e in events) >= n)


@MODES
@pytest.mark.parametrize("scope", ["rollout", "group", "experiment"])
async def test_running_attempts_are_cancelled_and_others_go_on(tmp_path: Path, processes: int, scope: str) -> None:
    folder = write_agent(tmp_path, SLOW, f"slow_{processes}_{scope}.py")
    async with running(f"slow_{processes}_{scope}:asleep", folder, processes=processes) as rig:
        (task,) = await rig.publish(["slow"], experiment_id="e")
        await begun(rig, 1)
        name = {"rollout": task.rollout_id, "group": task.group_id, "experiment": "e"}[scope]
        await say(rig, cancel_record(scope, name))  # type: ignore[arg-type]
        await rig.publish(["quick"])
        ended = await rig.ends(2)
    assert_whole(ended)
    assert ended['"quick"'].last.status == "succeeded"
    last = ended['"slow"'].last
    assert last.status == "cancelled"
    assert last.error is not None
    assert last.error.message == f"{scope} {name} has been cancelled"
    assert "cancelled" in [s.name for s in ended['"slow"'].spans]


@MODES
async def test_an_agent_that_ignores_its_cancel_is_killed(tmp_path: Path, processes: int) -> None:
    folder = write_agent(tmp_path, SLOW, f"stubborn_{processes}.py")
    policy = RunnerPolicy(cancel_grace_s=0.2)
    async with running(f"stubborn_{processes}:stubborn", folder, processes=processes, policy=policy) as rig:
        (task,) = await rig.publish(["slow"])
        await begun(rig, 1)
        await say(rig, cancel_record("rollout", task.rollout_id))
        (one,) = (await rig.ends(1)).values()
    assert one.last.status == "cancelled"


async def test_a_task_cancelled_before_it_is_seen_is_settled_and_never_run(tmp_path: Path) -> None:
    settings = settings_for_tests()
    rig = Rig(MemoryLog(settings.topics), settings)
    await say(rig, cancel_record("group", "g"))
    tasks = await rig.publish([1, 2], group_id="g")
    ran: list[int] = []
    async with running(ran.append, log=rig.log, settings=settings):
        events = await rig.read_until(lambda events: len(terminal(events)) >= 2)
    assert ran == []
    for task in tasks:
        mine = [e.status for e in events if isinstance(e, AttemptEvent) and e.rollout_id == task.rollout_id]
        assert mine == ["preparing", "cancelled"]


class CancelsDuringTheCommit(MemoryLog):
    """The commit of a claim ends when the runner has heard that the experiment is cancelled."""

    def __init__(self, topics: Topics) -> None:
        super().__init__(topics)
        self.topics, self.heard, self.handed_out = topics, asyncio.Event(), False

    def consumer(self, group: str | None = None) -> Consumer:
        consumer = super().consumer(group)
        if group is None:
            poll = consumer.poll

            async def noted_poll(*arguments: Any) -> list[LogRecord]:
                if self.handed_out:
                    self.heard.set()
                records = await poll(*arguments)
                self.handed_out = bool(records)
                return records

            consumer.poll = noted_poll  # type: ignore[method-assign]
        else:
            commit = consumer.commit

            async def slow_commit(offsets: Any) -> None:
                await publish_control(self.producer(), self.topics, cancel_record("experiment", "e"))
                await self.heard.wait()
                await commit(offsets)

            consumer.commit = slow_commit  # type: ignore[method-assign,assignment]
        return consumer


async def test_a_task_cancelled_while_it_is_claimed_does_not_run() -> None:
    ran: list[int] = []
    settings = settings_for_tests()
    log = CancelsDuringTheCommit(settings.topics)
    rig = Rig(log, settings)
    await rig.publish([1], experiment_id="e")
    async with running(ran.append, log=log, settings=settings):
        (last,) = terminal(await rig.read_until(lambda events: bool(terminal(events))))
    assert last.status == "cancelled"
    assert ran == []


async def test_a_paused_experiment_is_not_claimed_until_it_is_resumed() -> None:
    ran: list[int] = []
    settings = settings_for_tests(kafka_partitions=1)
    rig = Rig(MemoryLog(settings.topics), settings)
    await say(rig, pause_record("e", True))
    await rig.publish([0])
    await rig.publish([1, 2], experiment_id="e")
    await rig.publish([3])  # behind them on the partition
    await rig.publish([4], priority="high")
    async with running(ran.append, log=rig.log, settings=settings, concurrency=8):
        await rig.ends(2)
        await rig.publish([5], priority="high")  # claims go on
        await rig.ends(3)
        assert sorted(ran) == [0, 4, 5]
        await say(rig, pause_record("e", False))
        ended = await rig.ends(6)
    assert_whole(ended)
    assert sorted(ran) == [0, 1, 2, 3, 4, 5]


async def test_a_paused_task_that_is_cancelled_ends_and_frees_its_partition() -> None:
    ran: list[int] = []
    settings = settings_for_tests(kafka_partitions=1)
    rig = Rig(MemoryLog(settings.topics), settings)
    await say(rig, pause_record("e", True))
    (task,) = await rig.publish([1], experiment_id="e")
    await rig.publish([2])
    await rig.publish([3], priority="high")
    async with running(ran.append, log=rig.log, settings=settings):
        await rig.ends(1)
        assert ran == [3]
        await say(rig, cancel_record("rollout", task.rollout_id))
        await rig.read_until(lambda events: len(terminal(events)) >= 3)
    assert ran == [3, 2]


async def test_a_paused_task_survives_the_runner_that_held_it() -> None:
    ran: list[int] = []
    settings = settings_for_tests(kafka_partitions=1)
    rig = Rig(MemoryLog(settings.topics), settings)
    await say(rig, pause_record("e", True))
    await rig.publish([0])
    await rig.publish([1], experiment_id="e")
    async with running(ran.append, log=rig.log, settings=settings):
        await rig.ends(1)
    await say(rig, pause_record("e", False))
    async with running(ran.append, log=rig.log, settings=settings):
        await rig.ends(2)
    assert ran == [0, 1]
    assert len(by_input(await rig.everything())) == 2


async def test_an_attempt_that_shares_a_killed_process_is_lost(tmp_path: Path) -> None:
    folder = write_agent(tmp_path, SLOW, "shared.py")
    policy = RunnerPolicy(cancel_grace_s=0.2)
    async with running("shared:stubborn", folder, processes=1, concurrency=2, policy=policy) as rig:
        await rig.publish(["other"], timeout_s=60)
        await rig.publish(["late"], timeout_s=0.3)
        ended = await rig.ends(2)
    assert_whole(ended)
    assert ended['"late"'].last.status == "timeout"
    other = ended['"other"'].last
    assert other.status == "lost"
    assert other.error is not None
    assert "because another attempt had to be ended" in other.error.message
