import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from millstream.pipeline.algorithms.verl.config import (
    Job,
    VerlOptions,
    check,
    checkpoint_of,
    configuration,
    mark_of,
)
from millstream.pipeline.training.config import load_config
from millstream.schemas.errors import ConfigError

EXAMPLES = Path(__file__).parents[4] / "examples" / "verl"


def job(folder: Path = Path("/run"), **options: Any) -> Job:
    return Job(
        options=VerlOptions(model=Path("/model"), **options),
        run="run",
        experiment_id="e",
        started_ns=0,
        seed=3,
        steps=5,
        attempt="a1",
        folder=folder,
    )


def test_a_job_survives_its_way_to_the_other_process() -> None:
    there = job(clip=(0.1, 0.3), overrides=("trainer.critic_warmup=2",))
    assert Job.from_json(there.to_json()) == there


def test_verl_starts_no_model_servers_and_publishes_to_ours() -> None:
    found = configuration(job())
    rollout = "actor_rollout_ref.rollout"
    assert found["actor_rollout_ref.hybrid_engine"] is False
    assert found[f"{rollout}.name"] == found[f"{rollout}.checkpoint_engine.backend"] == "millstream"
    assert found["trainer.v1.trainer_mode"] == "millstream"
    assert found[f"{rollout}.checkpoint_engine.engine_kwargs"] == {"millstream": {"folder": "/run", "attempt": "a1"}}
    assert found[f"{rollout}.calculate_log_probs"] is True


@pytest.mark.parametrize(("rank", "merge"), [(0, False), (8, True)])
def test_adapters_are_merged_into_what_is_published(rank: int, merge: bool) -> None:
    found = configuration(job(lora_rank=rank))
    assert found["actor_rollout_ref.model.lora_rank"] == rank
    assert found["actor_rollout_ref.model.lora.merge"] is merge


def test_a_critic_is_configured_only_if_there_is_one() -> None:
    assert not [key for key in configuration(job()) if key.startswith("critic")]
    found = configuration(job(advantage="gae", critic_lr=1e-4))
    assert found["algorithm.adv_estimator"] == "gae"
    assert found["critic.optim.lr"] == 1e-4
    assert found["critic.strategy"] == "fsdp2"


def test_megatron_and_fsdp2_have_their_own_sections() -> None:
    megatron, fsdp = configuration(job(engine="megatron")), configuration(job())
    assert megatron["actor_rollout_ref.actor.strategy"] == "megatron"
    assert megatron["actor_rollout_ref.actor.megatron.dtype"] == "bfloat16"
    assert fsdp["actor_rollout_ref.actor.fsdp_config.dtype"] == "bfloat16"
    assert fsdp["actor_rollout_ref.actor.fsdp_config.model_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("options", "tasks", "why"),
    [
        ({"groups_per_step": 16, "minibatch": 5}, 100, "minibatch 5 does not divide groups_per_step 16"),
        ({"group_size": 1}, 100, "group_size 1 leaves nothing to compare"),
        ({}, 15, "15 tasks are less than the 16 of one step"),
        ({"nodes": 4, "minibatch": 1}, 100, "8 rollouts can't be divided among 32 GPUs"),
        (
            {"minibatch": 8, "micro_batch": 16},
            100,
            "64 rollouts can't be divided among 8 GPUs in parts of micro_batch = 16",
        ),
    ],
)
def test_what_verl_would_refuse_late_is_refused_first(options: dict[str, Any], tasks: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check(VerlOptions(model=Path("/model"), **options), tasks)


def test_a_group_of_one_is_fine_with_a_critic() -> None:
    check(VerlOptions(model=Path("/model"), group_size=1, micro_batch=2, advantage="gae"), 16)


def test_an_override_is_a_key_and_a_value() -> None:
    with pytest.raises(ValidationError, match=r"'trainer\.critic_warmup' is not KEY=VALUE"):
        VerlOptions(model=Path("/model"), overrides=("trainer.critic_warmup",))


def test_a_checkpoint_without_our_mark_was_not_finished(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path, 10)
    folder.mkdir(parents=True)
    assert mark_of(folder) is None
    (folder / "millstream.json").write_text(json.dumps({"step": 10}))
    assert mark_of(folder) == {"step": 10}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples_can_work(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config.algorithm, VerlOptions)
    check(config.algorithm, tasks=10_000)
    assert "UNTESTED" in path.read_text("utf-8")
