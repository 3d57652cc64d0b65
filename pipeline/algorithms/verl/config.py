"""What a verl job is made of: its options, the job of one start, and verl's own configuration that follows from both.

Needs no verl: `configuration` is a flat mapping from verl's keys to values, which the job puts over verl's defaults.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from millstream.schemas.errors import ConfigError

NAME: Final = "millstream"  # under which our trainer, rollouts and weights are registered in verl
BRIDGE: Final = "millstream.pipeline.algorithms.verl.bridge"
TRAINER: Final = "millstream.pipeline.algorithms.verl.trainer"
CHECKPOINTS: Final = "checkpoints"
MARK: Final = "millstream.json"  # our part of a checkpoint; written last, so a checkpoint with it is complete
WEIGHTS: Final = "model.safetensors"


class VerlOptions(BaseModel):
    """Arguments of `millstream.pipeline.algorithms.verl.algorithm.Verl`. In verl's words a group is a prompt, and its
    members are that prompt's rollouts (``n``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path = Field(description="Hugging Face folder of the policy.")
    groups_per_step: int = Field(16, ge=1, description="Tasks that a step trains on.")
    group_size: int = Field(8, ge=1, description="Rollouts of each.")
    minibatch: int = Field(16, ge=1, description="Groups per optimizer step; it divides groups_per_step.")
    epochs: int = Field(1, ge=1, description="Passes over the groups of a step.")
    lr: float = Field(1e-6, ge=0, description="For a pretrained model; 1e-3 for the calculator's random weights.")
    entropy: float = Field(0.0, ge=0, description="Bonus.")
    clip: tuple[float, float] = Field(
        (0.2, 0.28), description="DAPO's (arXiv:2503.14476): a higher upper clip keeps exploration alive."
    )
    kl: float = Field(
        0.0, ge=0, description="Weight of the distance (k3) to the initial model; 0: no reference is loaded."
    )
    advantage: Literal["turns", "gae"] = Field(
        "turns", description="turns: of each turn within its group, as GRPO; gae: of each token, by a critic."
    )
    critic_lr: float = Field(1e-5, ge=0, description="Learning rate of the critic.")
    lora_rank: int = Field(0, ge=0, description="0: all weights are trained. The merged weights are published.")
    lora_alpha: int = Field(16, ge=1, description="Adapters count alpha / rank times.")
    merge_turns: bool = Field(True, description="Merge turns that continue each other into one row.")
    ahead: float = Field(0.0, ge=0, description="Steps whose groups are under way while a step is trained on.")
    max_staleness: int = Field(
        8,
        ge=1,
        description="Versions that may have been published since a group was asked for; older ones are replaced.",
    )
    group_timeout_s: float = Field(
        7200.0, gt=0, description="A group that has not ended by then counts as failed, and another takes its place."
    )
    engine: Literal["fsdp2", "megatron"] = Field(
        "fsdp2", description="megatron is not tested on GPUs, nor is fsdp2 there."
    )
    device: Literal["cuda", "cpu"] = Field("cuda", description="The CPU is for tests.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of forward and backward; the optimizer's is float32."
    )
    nodes: int = Field(1, ge=1, description="Machines of the Ray cluster.")
    gpus_per_node: int = Field(8, ge=1, description="Ranks on each.")
    micro_batch: int = Field(4, ge=1, description="Rows per forward pass of a GPU.")
    max_prompt: int = Field(8192, ge=1, description="Tokens of a row's prompt.")
    max_response: int = Field(8192, ge=1, description="Tokens of a row after its prompt.")
    flash_attention: bool = Field(
        True, description="Needs flash-attn in verl's environment; else torch's own attention."
    )
    save_every: int = Field(10, ge=1, description="Steps between two checkpoints.")
    keep: int = Field(3, ge=1, description="Checkpoints.")
    ray: str = Field("", description="Address of a running Ray cluster; empty: the job starts Ray on this machine.")
    overrides: tuple[str, ...] = Field(
        (),
        description='Entries of verl\'s own configuration, as "actor_rollout_ref.actor.grad_clip=0.5"; they come last.',
    )

    @field_validator("overrides")
    @classmethod
    def _entries(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [each for each in overrides if "=" not in each]:
            raise ValueError(f"{wrong[0]!r} is not KEY=VALUE")
        return overrides


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One start of a job. ``folder`` is on a file system that all its nodes and the trainer's machine share."""

    options: VerlOptions
    run: str
    experiment_id: str
    started_ns: int
    seed: int
    steps: int  # of the whole run
    attempt: str  # names this start: [0-9a-f]+
    folder: Path
    resume_from: Path | None = None  # a checkpoint's folder

    @property
    def tasks_file(self) -> Path:
        return self.folder / "tasks.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.folder / f"metrics-{self.attempt}.jsonl"

    def to_json(self) -> str:
        return _JOB.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "Job":
        return _JOB.validate_json(text)


_JOB: TypeAdapter[Job] = TypeAdapter(Job)


def check(options: VerlOptions, tasks: int) -> None:
    """Raises `ConfigError` for what verl would refuse, or never end with, after its long start."""
    if options.groups_per_step % options.minibatch:
        raise ConfigError(
            f"minibatch {options.minibatch} does not divide groups_per_step {options.groups_per_step}: "
            "all optimizer steps take equally many groups"
        )
    if options.advantage == "turns" and options.group_size < 2:
        raise ConfigError('group_size 1 leaves nothing to compare a rollout with: take 2 or more, or advantage = "gae"')
    if tasks < options.groups_per_step:
        raise ConfigError(f"{tasks} tasks are less than the {options.groups_per_step} of one step: give more tasks")
    ranks = options.nodes * options.gpus_per_node
    rollouts = options.minibatch * options.group_size
    if rollouts % (ranks * options.micro_batch):
        raise ConfigError(
            f"minibatch × group_size = {rollouts} rollouts can't be divided among {ranks} GPUs in parts of micro_batch "
            f"= {options.micro_batch}"
        )


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where verl writes its checkpoint of a step, within a job's folder."""
    return folder / CHECKPOINTS / f"global_step_{step}"


def mark_of(checkpoint: Path) -> dict[str, Any] | None:
    """Our part of a checkpoint; None if it is not complete."""
    try:
        mark: dict[str, Any] = json.loads((checkpoint / MARK).read_text("utf-8"))
    except FileNotFoundError:
        return None
    return mark


def configuration(job: Job) -> dict[str, Any]:
    """verl's keys and values for a job; what is not in it has verl's own default."""
    options = job.options
    engine = "fsdp_config" if options.engine == "fsdp2" else "megatron"
    actor, ref, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
    found: dict[str, Any] = {
        # What travels between verl and us
        "trainer.v1.trainer_mode": NAME,
        f"{rollout}.name": NAME,
        f"{rollout}.agent.agent_loop_manager_class": f"{TRAINER}.Rollouts",
        f"{rollout}.checkpoint_engine.backend": NAME,
        f"{rollout}.checkpoint_engine.custom_backend_module": BRIDGE,
        f"{rollout}.checkpoint_engine.engine_kwargs": {NAME: {"folder": str(job.folder), "attempt": job.attempt}},
        "data.custom_cls.path": f"pkg://{BRIDGE}",
        "data.custom_cls.name": "Tasks",
        "trainer.checkpoint_callback_class": f"{TRAINER}.Mark",
        # Models are served outside verl: it starts no rollout servers.
        "actor_rollout_ref.hybrid_engine": False,
        f"{rollout}.nnodes": 1,
        f"{rollout}.n_gpus_per_node": 1,
        f"{rollout}.calculate_log_probs": True,  # compares what was served with what is trained, at each step
        f"{rollout}.n": options.group_size,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": options.micro_batch,
        # Data
        "data.train_files": str(job.tasks_file),
        "data.val_files": str(job.tasks_file),
        "data.train_batch_size": options.groups_per_step,
        "data.max_prompt_length": options.max_prompt,
        "data.max_response_length": options.max_response,
        "data.dataloader_num_workers": 0,  # a line of JSON needs none, and their state would not be ours to save
        "data.shuffle": True,
        "data.seed": job.seed,
        # Learning
        "algorithm.adv_estimator": "gae" if options.advantage == "gae" else "grpo",
        "algorithm.use_kl_in_reward": False,
        f"{actor}.optim.lr": options.lr,
        f"{actor}.ppo_mini_batch_size": options.minibatch,
        f"{actor}.ppo_micro_batch_size_per_gpu": options.micro_batch,
        f"{actor}.ppo_epochs": options.epochs,
        f"{actor}.entropy_coeff": options.entropy,
        f"{actor}.clip_ratio_low": options.clip[0],
        f"{actor}.clip_ratio_high": options.clip[1],
        f"{actor}.use_kl_loss": options.kl > 0,
        f"{actor}.kl_loss_coef": options.kl,
        f"{actor}.kl_loss_type": "low_var_kl",
        f"{actor}.use_dynamic_bsz": False,
        f"{actor}.data_loader_seed": job.seed,
        f"{actor}.shuffle": True,  # verl pads a batch at its end: else the last optimizer step would see little else
        f"{ref}.log_prob_micro_batch_size_per_gpu": options.micro_batch,
        # Models
        "actor_rollout_ref.model.path": str(options.model),
        "actor_rollout_ref.model.use_remove_padding": options.flash_attention,
        "actor_rollout_ref.model.override_config.attn_implementation": _attention(options),
        "actor_rollout_ref.model.lora_rank": options.lora_rank,
        "actor_rollout_ref.model.lora_alpha": options.lora_alpha,
        "actor_rollout_ref.model.target_modules": "all-linear",
        # Else it is the base weights that are published, under the names of the adapter's modules.
        "actor_rollout_ref.model.lora.merge": options.lora_rank > 0,
        f"{actor}.strategy": options.engine,
        f"{ref}.strategy": options.engine,
        f"{actor}.{engine}.dtype": options.dtype,
        f"{ref}.{engine}.dtype": options.dtype,
        # Steps and checkpoints
        "trainer.device": options.device,
        "trainer.nnodes": options.nodes,
        "trainer.n_gpus_per_node": options.gpus_per_node,
        "trainer.total_training_steps": job.steps,
        "trainer.total_epochs": job.steps,  # a step takes no more than all tasks: the steps end it
        "trainer.val_before_train": False,  # the trainer's process validates, with the version that it serves
        "trainer.test_freq": -1,
        "trainer.logger": ["console", "file"],
        "trainer.project_name": NAME,
        "trainer.experiment_name": job.run,
        "trainer.default_local_dir": str(job.folder / CHECKPOINTS),
        "trainer.save_freq": options.save_every,
        # The run keeps ``keep`` of its own, which name verl's; the one that is being written is not among them.
        "trainer.max_actor_ckpt_to_keep": options.keep + 1,
        "trainer.max_critic_ckpt_to_keep": options.keep + 1,
        "trainer.resume_mode": "resume_path" if job.resume_from else "disable",
        "trainer.resume_from_path": str(job.resume_from) if job.resume_from else None,
        "trainer.v1.sampler.max_off_policy_threshold": options.max_staleness,
        "reward.num_workers": 1,  # rewards come with the rollouts
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    }
    if options.engine == "fsdp2":
        found |= {f"{part}.fsdp_config.model_dtype": "fp32" for part in (actor, ref)}  # the optimizer's weights
    if options.advantage == "gae":
        found |= {
            "critic.strategy": options.engine,
            "critic.optim.lr": options.critic_lr,
            "critic.ppo_mini_batch_size": options.minibatch,
            "critic.ppo_micro_batch_size_per_gpu": options.micro_batch,
            "critic.use_dynamic_bsz": False,
            "critic.model.path": str(options.model),
            "critic.model.use_remove_padding": options.flash_attention,
        }
        if options.engine == "fsdp2":
            found |= {"critic.fsdp.model_dtype": "fp32", "critic.fsdp.dtype": options.dtype}
    if options.ray:
        found["ray_kwargs.ray_init.address"] = options.ray
    return found


def _attention(options: VerlOptions) -> str:
    return "flash_attention_2" if options.flash_attention else "sdpa"
