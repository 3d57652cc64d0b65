"""A trainer that is killed at random moments, in memory and over Kafka, loses nothing and trains on nothing twice."""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from resumable import PER_STEP, SIZE, Chain, agent, train

from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.runner.runner import Runner
from millstream.schemas.config.settings import Settings

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.chaos]

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "3"))  # 50 take about three minutes each
STEPS = max(30, 6 * KILLS)  # so that it is killed as often
LIVES_S = 2.5  # at most, of a trainer that has started


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    learner = Chain()
    train(tmp_path_factory.mktemp("run"), learner, agent=agent, steps=STEPS)
    return learner


def killed(
    run_dir: Path, options: dict[str, Any], env: dict[str, str], seed: int, kills: int = KILLS
) -> dict[str, Any]:
    """What the trainer that lives to the end reports."""
    rng = random.Random(seed)
    command = [sys.executable, ROOT / "tests/support/resumable.py", run_dir, json.dumps({"steps": STEPS, **options})]
    for kill in range(kills + 1):
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as trainer:
            assert trainer.stdout is not None
            assert trainer.stdout.readline() == b"started\n"
            try:
                trainer.wait(None if kill == kills else rng.uniform(0, LIVES_S))
            except subprocess.TimeoutExpired:
                trainer.kill()
        if trainer.returncode == 0:
            break
    assert trainer.returncode == 0
    print(f"killed {kill} times")
    return json.loads((run_dir / "result.json").read_text())  # type: ignore[no-any-return]


def environment(**variables: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")} | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}",
        **variables,
    }


def check(result: dict[str, Any], uninterrupted: Chain, max_staleness: int) -> None:
    trained = [number for step in result["ledger"] for number in step]
    assert result["steps"] == list(range(STEPS))
    assert len(trained) == len(set(trained)) == STEPS * PER_STEP
    assert all(len(set(ids)) == SIZE for step in result["ledger"] for ids in step.values())
    if max_staleness == 0:
        assert result["weight"] == uninterrupted.weight.item()
        assert [list(step) for step in result["ledger"]] == [list(step) for step in uninterrupted.ledger]
    else:
        assert result["oldest"] <= 2 * max_staleness


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_in_memory(tmp_path: Path, uninterrupted: Chain, max_staleness: int) -> None:
    """Each kill costs the rollouts of a step: the log is gone."""
    result = killed(tmp_path, {"max_staleness": max_staleness}, environment(), seed=1, kills=KILLS // 2)
    check(result, uninterrupted, max_staleness)


@pytest.mark.kafka
@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_over_kafka(
    tmp_path: Path, uninterrupted: Chain, max_staleness: int, kafka_settings: Callable[..., Settings]
) -> None:
    """Runners and adapter go on; so do the rollouts that the killed trainer had asked for."""
    settings = kafka_settings(proxy_url="")
    log, stop = KafkaLog(settings), asyncio.Event()
    await log.create_topics()
    env = environment(
        MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS=settings.kafka_bootstrap_servers,
        MILLSTREAM_TOPIC_PREFIX=settings.topic_prefix,
        MILLSTREAM_KAFKA_PARTITIONS=str(settings.kafka_partitions),
    )
    runner = Runner(log, settings, agent, concurrency=8, processes=0)
    adapter = Adapter(log, settings.topics, transactional_id=f"{settings.topic_prefix}.adapter")
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        group.create_task(runner.run(stop))
        group.create_task(adapter.run(stop))
        options = {"max_staleness": max_staleness, "strategy": "kafka"}
        try:
            result = await asyncio.to_thread(killed, tmp_path, options, env, 1)
        finally:
            stop.set()
    check(result, uninterrupted, max_staleness)
