"""Comparing versions of prompts on the rollouts that come."""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import millstream as ms
from millstream.consumers.control import ControlFollower, ControlPolicy
from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.prompts.splitting import split
from millstream.pipeline.training.collector import ends_of
from millstream.producers.control import publish_resources
from millstream.producers.tasks import TaskLine, TaskPublisher, group_of
from millstream.schemas.control import Resources, Split
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import derived_id, new_id
from millstream.schemas.wire.records import RolloutEnd
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", 2)


def version(number: int, experiment: str = "e") -> Resources:
    items = {"system": ms.PromptTemplate(template=f"prompt {number}")}
    return Resources(resources_id=derived_id(number * 10**9, experiment), experiment_id=experiment, items=items)


def test_rollouts_are_shared_by_weight_and_stay_with_their_version() -> None:
    shares = {"a": 3.0, "b": 0.0, "c": 1.0}
    made = Split(experiment_id="e", latest="c", shares=shares)
    rollouts = [new_id() for _ in range(4000)]
    drawn = [made.choose(rollout) for rollout in rollouts]
    assert Counter(drawn)["a"] == pytest.approx(3000, abs=150)
    assert set(drawn) == {"a", "c"}
    assert [Split.from_control(made.to_control()).choose(rollout) for rollout in rollouts] == drawn
    other = Split(experiment_id="other", latest="c", shares=shares)
    assert [other.choose(rollout) for rollout in rollouts] != drawn


async def test_a_split_holds_until_a_version_is_published_and_its_versions_are_kept() -> None:
    log, rollouts = MemoryLog(TOPICS), [new_id() for _ in range(50)]
    follower = ControlFollower(log, TOPICS, policy=ControlPolicy(versions=2))
    first, second, third = version(1), version(2), version(3)
    for each in (first, second):
        await publish_resources(log.producer(), TOPICS, each)
    await follower.start()

    async def drawn(experiment: str = "e") -> set[str | None]:
        await follower.wait_until_current()
        return {follower.version_for(experiment, rollout) for rollout in rollouts}

    assert await drawn() == {second.resources_id}
    await split(log, TOPICS, "e", {first.resources_id: 1, second.resources_id: 1})
    for number in range(9):
        await publish_resources(log.producer(), TOPICS, version(number, "other"))
    assert await drawn() == {first.resources_id, second.resources_id}
    assert await drawn("other") == {version(8, "other").resources_id}
    assert await drawn("unknown") == {None}
    assert follower.pinned(first.resources_id) == first
    await publish_resources(log.producer(), TOPICS, third)
    assert await drawn() == {third.resources_id}
    await publish_resources(log.producer(), TOPICS, second)  # a trainer that goes on announces it again
    assert await drawn() == {third.resources_id}
    await follower.close()


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({version(1).resources_id: 0.0}, "at least one above 0"),
        ({version(1).resources_id: -1.0}, "numbers from 0 on"),
        ({version(1).resources_id: float("nan")}, "numbers from 0 on"),
        ({"nothing": 1.0}, "experiment e has no resources version nothing that rollouts could run with"),
        ({version(1, "other").resources_id: 1.0}, "experiment e has no resources version"),
    ],
)
async def test_what_can_not_be_shared_is_refused(shares: dict[str, float], says: str) -> None:
    log = MemoryLog(TOPICS)
    for each in (version(1), version(1, "other")):
        await publish_resources(log.producer(), TOPICS, each)
    with pytest.raises(ConfigError, match=says):
        await split(log, TOPICS, "e", shares)


async def test_a_retry_keeps_the_version_of_the_first_attempt(tmp_path: Path) -> None:
    """Also if the comparison ends in between. The store says which version earned what."""
    seen: list[tuple[str, int, str]] = []
    first_attempts, ended = threading.Semaphore(0), threading.Event()

    def agent(task: int, resources: dict[str, Any], rollout: Any) -> float:
        text = resources["system"].template
        seen.append((rollout.rollout_id, rollout.attempt, text))
        if rollout.attempt == 1 and not ended.is_set():
            first_attempts.release()
            ended.wait(60)
            raise RuntimeError("it fails once")
        return float(text == "prompt 2")

    @ms.algorithm
    async def compare(run: ms.Run) -> None:
        experiment, settings = run.experiment.experiment_id, run.settings
        versions = [version(number, experiment) for number in (1, 2)]
        for each in versions:
            await run.announce(each)
        await split(run.log, settings.topics, experiment, {each.resources_id: 0.5 for each in versions})

        async def rollouts(count: int, begun: Callable[[], Awaitable[None]]) -> list[RolloutEnd]:
            line = TaskLine(input=1, max_attempts=2)
            tasks = [task for _ in range(count) for task in group_of(line, settings, experiment_id=experiment)]
            producer = run.log.producer()

            async def publish() -> None:
                await TaskPublisher(producer, settings).publish(tasks)
                await begun()

            return await ends_of(run.log, producer, settings.topics, [task.rollout_id for task in tasks], publish, 60)

        async def end() -> None:
            for _ in range(16):
                await asyncio.to_thread(first_attempts.acquire, timeout=60)
            await run.publish(version(3).items)
            ended.set()

        async def nothing() -> None: ...

        compared = await rollouts(16, end)
        assert {each.resources_id for each in compared} == {each.resources_id for each in versions}
        later = await rollouts(4, nothing)
        assert {each.resources_id for each in later} == {run.resources_id}

    settings = ms.load_settings(runner_concurrency=16)
    trainer = ms.Trainer(algorithm=compare, agent=agent, tasks=[1], run_dir=tmp_path, settings=settings)
    await trainer.train()
    attempts: dict[str, list[str]] = {}
    for rollout_id, _, text in sorted(seen):
        attempts.setdefault(rollout_id, []).append(text)
    assert Counter(map(len, attempts.values())) == {2: 16, 1: 4}
    assert all(len(set(texts)) == 1 for texts in attempts.values())
    store = ms.ClickHouseStore(ms.load_settings(clickhouse_dsn=f"chdb://{tmp_path}/store"))
    rows = store.sql("SELECT resources_id, avg(reward) FROM rollouts GROUP BY resources_id ORDER BY resources_id").rows
    store.close()
    assert [mean for _, mean in rows] == [0.0, 1.0, 0.0]
