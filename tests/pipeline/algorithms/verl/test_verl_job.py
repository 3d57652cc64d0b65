"""verl itself, on this CPU: Ray, FSDP2 over gloo, and a real Kafka between it and the agents.

Ray's processes have to come up within fixed times: run these tests on a machine that does nothing else.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.read_to_end import read_to_end
from millstream.pipeline.addresses import free_port
from millstream.schemas.config.settings import Settings
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutEnd, TrainingStep

pytestmark = [pytest.mark.verl, pytest.mark.slow, pytest.mark.kafka, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
PYTHON = ROOT / ".venv-verl" / "bin" / "python"
GROUPS, MEMBERS = 8, 8  # as in verl_run.py

Entries = list[dict[str, Any]]


@pytest.fixture
def settings(kafka_settings: Callable[..., Settings]) -> Settings:
    return kafka_settings()


@pytest.fixture
def run(tmp_path: Path, settings: Settings) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `verl_run.py`: ``run(steps, **options)``. Each has the same folder and topics."""
    if not PYTHON.exists():
        pytest.skip("there is no .venv-verl; `make verl` sets it up")
    variables = {
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
        "MILLSTREAM_MODEL_URL": f"http://127.0.0.1:{free_port()}",
        "MILLSTREAM_CLICKHOUSE_DSN": f"chdb://{tmp_path / 'store'}",
        "MILLSTREAM_VERL_PYTHON": str(PYTHON),
        "MILLSTREAM_LEASE_S": "5",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "PYTHONPATH": f"{ROOT}:{HERE}",
    }
    started: list[subprocess.Popen[str]] = []

    def start(steps: int, **options: Any) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, str(HERE / "verl_run.py"), str(tmp_path), str(steps), json.dumps(options)],
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)


def entries(process: subprocess.Popen[str]) -> Entries:
    """All that it prints. It has ended well."""
    assert process.stdout is not None
    found = [json.loads(line) for line in process.stdout]
    assert process.wait() == 0
    return found


def steps_of(found: Entries) -> Entries:
    return [entry for entry in found if "step" in entry]


def digests(found: Entries) -> dict[str, str]:
    return {entry["version"]: entry["digest"] for entry in found if "version" in entry}


async def values_of(settings: Settings, topic: str, count: int) -> list[Any]:
    partitions = [Partition(topic, number) for number in range(count)]
    return [codec.decode(record.value) async for record in read_to_end(KafkaLog(settings), partitions)]


async def ends(settings: Settings) -> Counter[str]:
    """How often each training rollout has ended."""
    values = await values_of(settings, settings.topics.triplets, settings.topics.partitions)
    return Counter(v.rollout_id for v in values if isinstance(v, RolloutEnd) and v.mode == "train")


async def trained(settings: Settings) -> Counter[str]:
    """How often each rollout was trained on. The first record of a step counts."""
    steps: dict[int, TrainingStep] = {}
    for value in await values_of(settings, settings.topics.training, 1):
        steps.setdefault(value.step, value)
    return Counter(rollout for step in steps.values() for rollout in step.trained)


def test_the_agent_learns_from_what_its_own_weights_have_sampled(run: Callable[..., subprocess.Popen[str]]) -> None:
    found = entries(run(12))
    steps = steps_of(found)
    assert len(steps) == 12
    rewards = [step["reward"] for step in steps]
    assert fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.1
    assert max(step["training/rollout_probs_diff_max"] for step in steps) < 0.01
    assert len(set(digests(found).values())) == 13


def test_nothing_changes_without_a_learning_rate(run: Callable[..., subprocess.Popen[str]]) -> None:
    found = entries(run(2, lr=0.0))
    assert len(digests(found)) == 3
    assert len(set(digests(found).values())) == 1


async def test_a_killed_run_goes_on_with_the_saved_weights_and_the_rollouts_that_were_under_way(
    run: Callable[..., subprocess.Popen[str]], settings: Settings
) -> None:
    first = run(4, save_every=1)
    assert first.stdout is not None
    before: Entries = []
    while "run.0.2" not in digests(before):
        before.append(json.loads(first.stdout.readline()))
    while len(await ends(settings)) <= 2 * GROUPS * MEMBERS:
        pass  # until some of the third step's rollouts have ended, while others run; each look takes a while
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    found = entries(run(4, save_every=1))
    (went_on, *_) = digests(found)
    assert went_on.endswith(".2")
    assert digests(found)[went_on] == digests(before)["run.0.2"]
    assert [step["step"] for step in steps_of(found)] == [2, 3]
    ended = await ends(settings)
    assert set(ended.values()) == {1}
    assert len(ended) == 4 * GROUPS * MEMBERS
    assert await trained(settings) == ended


def test_too_few_cpus_are_said_at_once(run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """verl would wait for them without a word."""
    trainer = run(1, overrides=["ray_kwargs.ray_init.num_gpus=1", "ray_kwargs.ray_init.num_cpus=4"])
    assert trainer.wait() == 1
    assert "verl needs 1 Ray nodes with 3 CPUs each, and 3 CPUs more" in (tmp_path / "verl" / "job.log").read_text()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"gpus_per_node": 2}, id="two ranks"),
        pytest.param({"advantage": "gae", "critic_lr": 1e-3, "kl": 0.01}, id="critic and reference"),
        pytest.param({"lora_rank": 8}, id="lora"),
        pytest.param({"ahead": 1.0}, id="a step ahead"),
    ],
)
def test_what_else_verl_is_told_to_do(run: Callable[..., subprocess.Popen[str]], options: dict[str, Any]) -> None:
    found = entries(run(2, **options))
    assert len(set(digests(found).values())) == 3
    assert len({entry["names"] for entry in found if "version" in entry}) == 1
    steps = steps_of(found)[: 1 if "ahead" in options else 2]  # later ones train on what earlier weights have sampled
    assert max(step["training/rollout_probs_diff_max"] for step in steps) < 0.01
