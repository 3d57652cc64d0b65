"""A verl job, in the environment that has verl: the driver, and the task runner that it starts on Ray.

Its job and settings come as one line of JSON on standard input: passwords are in neither arguments, environment nor
files.
"""

import json
import os
import sys
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import ray
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from verl.single_controller.ray.base import ResourcePoolManager
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from millstream.pipeline.algorithms.verl.config import Job, configuration, mark_of
from millstream.pipeline.training.run import Experiment, Run
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError

OTHER_CPUS = 3  # of the task runner, and of TransferQueue's controller and storage


def main() -> None:
    given = json.loads(sys.stdin.readline())
    job, settings = Job.from_json(json.dumps(given["job"])), Settings(**given["settings"])

    class Runner:
        """What `run_ppo` makes a task runner of."""

        @staticmethod
        def remote() -> Any:
            actor: Any = TaskRunner
            return actor.remote(job, settings)

    run_ppo(verl_config(job), task_runner_class=Runner)
    ray.shutdown()


def verl_config(job: Job) -> DictConfig:
    """verl's defaults for the engine, under ours, under the user's."""
    groups = ["model_engine=megatron"] if job.options.engine == "megatron" else []
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", groups)
    OmegaConf.set_struct(config, False)
    for key, value in configuration(job).items():
        OmegaConf.update(config, key, value, force_add=True)
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(job.options.overrides)))
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    return config


@ray.remote(num_cpus=1)
class TaskRunner:
    """As verl's own, which a Ray actor can't inherit from."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self._job = job
        self._settings = settings

    def run(self, config: DictConfig) -> None:
        """Trains to the job's last step."""
        import transfer_queue as tq  # it belongs to the task runner's process
        from transformers import AutoConfig
        from verl.utils.logging_utils import configure_verl_logging

        from millstream.pipeline.algorithms.verl.rows import RowRules
        from millstream.pipeline.algorithms.verl.trainer import Rollouts, Trainer

        configure_verl_logging()
        job = self._job
        os.environ["VERL_FILE_LOGGER_PATH"] = str(job.metrics_file)
        config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        tq.init(config.transfer_queue)
        try:
            trainer = Trainer(config, job)
            check_cpus(config.trainer.nnodes, config.trainer.n_gpus_per_node)
            trainer.init()
            rules = RowRules(
                vocabulary=AutoConfig.from_pretrained(job.options.model).get_text_config().vocab_size,
                merge_turns=job.options.merge_turns,
                least=2 if job.options.advantage == "turns" else 1,
            )
            rollouts = Rollouts(partial(connect, job, self._settings), job, rules)
            done = False
            try:
                trainer.fit(rollouts)
                done = True
            finally:
                rollouts.close(done)
        finally:
            tq.close()


def check_cpus(nodes: int, gpus: int) -> None:
    """Raises `ConfigError` if Ray has too few CPUs for verl's workers, which would be waited for without a word; verl
    itself checks the GPUs."""
    each = ResourcePoolManager.max_colocate_count * gpus
    cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if sum(count >= each for count in cpus) < nodes or sum(cpus) < each * nodes + OTHER_CPUS:
        raise ConfigError(
            f"verl needs {nodes} Ray nodes with {each} CPUs each, and {OTHER_CPUS} CPUs more; Ray has nodes with "
            f"{', '.join(f'{count:g}' for count in cpus)}: set ray_kwargs.ray_init.num_cpus in `overrides` for a Ray "
            "that the trainer starts, or take fewer GPUs"
        )


def connect(job: Job, settings: Settings) -> AbstractAsyncContextManager[Run]:
    """The run of the trainer's process, from here."""
    experiment = Experiment(job.run, job.seed, experiment_id=job.experiment_id, started_ns=job.started_ns)
    mark = None if job.resume_from is None else mark_of(job.resume_from)
    positions = None if mark is None else {int(partition): offset for partition, offset in mark["positions"].items()}
    return Run.connect(settings, experiment, positions=positions)
