"""A training run's metrics."""

import asyncio
import math
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.request import urlopen

from exposition import checked, text_of
from factories import finished, step_report

from millstream.consumers.adapter.triplets import to_triplets
from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.addresses import free_port
from millstream.pipeline.services.health import Health
from millstream.pipeline.training.config import with_probes
from millstream.pipeline.training.groups import Group
from millstream.pipeline.training.report import flat_groups
from millstream.pipeline.training.reporting.metrics import TrainingMetrics
from millstream.pipeline.training.strategy import Setup
from millstream.schemas.config.settings import load_settings

E = ("experiment", "e")
FIRST = step_report(flat_groups=1, dropped={"too_old": 1, "no_signal": 4}, experiment_id="e")


def values(samples, name, label):
    return {dict(labels)[label]: value for labels, value in samples[f"millstream_train_{name}"].items()}


def exported(metrics):
    health = Health(list, asyncio.Event())
    health.registry.register(metrics)
    return checked(text_of(health.registry))


def test_each_value_is_that_of_the_steps():
    metrics = TrainingMetrics()
    metrics.ended(FIRST)
    found = exported(metrics)
    assert found["millstream_train_step"] == {(E,): 5}
    assert values(found, "reward", "mode") == {"train": 0.75, "val": 0.5}
    assert values(found, "phase_seconds_total", "phase") == FIRST.phases
    assert values(found, "staleness_versions", "of") == {"mean": 1.5, "max": 2}
    assert values(found, "groups_total", "signal") == {"none": 1 + 4, "some": 3 - 1}
    assert values(found, "groups_dropped_total", "reason") == {"too_old": 1, "no_signal": 4}
    assert values(found, "metric", "name") == {"kl": 0.01}
    assert found["millstream_train_tokens_total"] == {(E,): 77}

    second = replace(FIRST, step=5, reward=0.0, failed=16, validation_reward=None, dropped={}, flat_groups=0)
    metrics.ended(replace(second, metrics={"entropy": math.nan}))
    found = exported(metrics)
    assert found["millstream_train_step"] == {(E,): 6}
    assert values(found, "reward", "mode") == {"train": 0.75, "val": 0.5}  # no rollout of the step succeeded
    assert values(found, "phase_seconds_total", "phase") == {name: 2 * s for name, s in FIRST.phases.items()}
    assert values(found, "groups_total", "signal") == {"none": 5, "some": 5}
    assert list(values(found, "metric", "name")) == ["entropy"]  # what is no longer reported is absent


def test_a_group_whose_rewards_are_all_alike_is_flat():
    def group(*rewards, status="succeeded"):
        return Group("g", tuple(finished(str(n), [], status, reward=reward) for n, reward in enumerate(rewards)))

    assert flat_groups([group(0.5, 0.5), group(0.0, 1.0), group(None, 0.0), group(1.0)]) == 3
    assert flat_groups([group(1.0, 0.0, status="failed")]) == 1
    assert flat_groups([]) == 0


async def test_a_trainers_port_has_its_metrics_while_the_run_goes_on(tmp_path):
    metrics = TrainingMetrics()

    @asynccontextmanager
    async def only_a_log(setup):
        yield MemoryLog(setup.settings.topics), None

    setup = Setup(settings=load_settings(), agent=None, to_triplets=to_triplets, run_dir=tmp_path)
    async with with_probes(only_a_log, port := free_port(), metrics)(setup):
        metrics.ended(FIRST)
        text = await asyncio.to_thread(get, port)
    samples = checked(text)
    assert samples["millstream_train_step"] == {(E,): 5}
    ((labels, one),) = samples["millstream_build_info"].items()
    assert (dict(labels)["role"], one) == ("trainer", 1)


def get(port):
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return response.read().decode()
