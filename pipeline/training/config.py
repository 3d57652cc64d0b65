"""``millstream train CONFIG.toml``: a training run from a file."""

import asyncio
import dataclasses
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console

from millstream.consumers.log.port import Log
from millstream.pipeline.algorithms.options import Options, algorithm_of
from millstream.pipeline.models.server import ModelServer
from millstream.pipeline.models.vllm_process import Transfer, VllmOptions
from millstream.pipeline.services.role_process import role_process
from millstream.pipeline.training.deployment import strategy_of
from millstream.pipeline.training.progress import ProgressView
from millstream.pipeline.training.report import StepReport, Summary
from millstream.pipeline.training.reporting.metrics import TrainingMetrics
from millstream.pipeline.training.strategy import Setup, Strategy
from millstream.pipeline.training.trainer import Trainer
from millstream.schemas.config.settings import Settings, load_settings, problems_of
from millstream.schemas.errors import ConfigError
from millstream.schemas.folders import make_folder
from millstream.schemas.import_path import load_object
from millstream.schemas.spans.text import json_text, parsed


class ModelConfig(BaseModel):
    """The server of the policy: the demo engine, or vLLM processes that the trainer starts on this machine."""

    model_config = ConfigDict(extra="forbid")

    server: Literal["engine", "vllm"] = "engine"
    deterministic: bool = Field(
        default=False,
        description="The demo engine computes each answer alone, so that the same seed gives the same bits; slower.",
    )
    names: tuple[str, ...] = Field(default=("policy",), min_length=1, description="Model names that vLLM answers to.")
    args: tuple[str, ...] = Field(default=(), description='Further arguments of vLLM, such as "--dtype", "float32".')
    replicas: int = Field(
        default=1,
        ge=1,
        description="vLLM processes, at model_url and the ports after it; [upstreams] names them all.",
    )
    transfer: Transfer = Field(
        default="file", description="How new weights reach vLLM; nccl and ipc are not tested on GPUs."
    )


class TrainConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    run: str = Field("run", pattern=r"^[A-Za-z0-9_-]+$", description="First part of every model version.")
    run_dir: Path = Path("runs/default")
    strategy: Literal["memory", "kafka"] = "kafka"
    agent: str | None = Field(None, description="module:attribute; over Kafka the runners load it.")
    hooks: list[str] = Field([], description="module:attribute of each, in order; needs `agent`.")
    tasks: Path = Field(description="JSON lines, as for `millstream publish`.")
    val_tasks: Path | None = None
    max_steps: int = Field(100, ge=0)
    stop_reward: float | None = None
    patience: int = Field(3, ge=1)
    seed: int = 0
    model: ModelConfig = ModelConfig()
    resume: str = Field(
        "auto",
        description='"auto": from the last checkpoint in run_dir; "never": refuses a folder with checkpoints; or a '
        'checkpoint, such as "step-42".',
    )
    algorithm: Options

    @model_validator(mode="before")
    @classmethod
    def _table_of_a_type(cls, given: Any) -> Any:
        """``[grpo]`` and ``[verl]`` are short for ``[algorithm]`` with that type."""
        for name in ("grpo", "verl"):
            if isinstance(given, dict) and "algorithm" not in given and isinstance(given.get(name), dict):
                rest = {key: value for key, value in given.items() if key != name}
                return rest | {"algorithm": {**given[name], "type": name}}
        return given

    @model_validator(mode="after")
    def _verl_over_kafka(self) -> "TrainConfig":
        if self.algorithm.type == "verl" and self.strategy != "kafka":
            raise ValueError('verl needs strategy = "kafka": its job asks for rollouts from another process')
        return self


def with_probes(strategy: Strategy, health_port: int, metrics: TrainingMetrics | None = None) -> Strategy:
    """The strategy of a trainer that is a process: serves health probes and metrics, and ends the process if it is
    stuck."""

    @asynccontextmanager
    async def running(setup: Setup) -> AsyncIterator[tuple[Log, ModelServer | None]]:
        async with (
            strategy(setup) as (log, server),
            # Idle is fine: a step of training may take any time.
            role_process(log, setup.settings, "trainer", health_port, asyncio.Event(), allow_idle=True) as health,
        ):
            if metrics is not None:
                health.registry.register(metrics)
            yield log, server

    return running


def load_config(path: Path) -> TrainConfig:
    """Raises `ConfigError` naming the file and each wrong entry."""
    try:
        return TrainConfig(**tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems_of(error)}") from None


def read_inputs(path: Path, settings: Settings) -> list[Any]:
    """The inputs of a tasks file, in order."""
    from millstream.producers.tasks import read_tasks

    return [parsed(task.input) for task in read_tasks(path, settings)[0]]


def train_from(path: Path, console: Console | None = None, adapter: str = "", health_port: int = 0) -> Summary:
    """Trains with a live view and writes the summary to ``train.json`` in the run's folder. ``adapter`` is
    ``module:attribute`` of a function from traces to triplets, for runs in memory. ``health_port``:
    as `role_process` serves it.

    Raises `ConfigError` if the file is wrong or the `train` extra is missing.
    """
    config = load_config(path)
    settings = load_settings()
    tasks = read_inputs(config.tasks, settings)
    val_tasks = read_inputs(config.val_tasks, settings) if config.val_tasks else []
    make_folder(config.run_dir, "run_dir")
    metrics = TrainingMetrics()
    with ProgressView(console or Console(), config.run) as view:

        def on_step(report: StepReport) -> None:
            view.on_step(report)
            metrics.ended(report)

        trainer = Trainer(
            algorithm=algorithm_of(config.algorithm),
            agent=config.agent,
            strategy=with_probes(strategy_of(config.strategy), health_port, metrics),
            hooks=config.hooks,
            max_steps=config.max_steps,
            stop_reward=config.stop_reward,
            patience=config.patience,
            run=config.run,
            run_dir=config.run_dir,
            resume=config.resume,
            adapter=load_object("adapter", adapter, str(Path.cwd())) if adapter else None,
            seed=config.seed,
            settings=settings,
            on_step=on_step,
            vllm=vllm_options(config.model),
            deterministic=config.model.deterministic,
        )
        summary = trainer.fit(tasks, val_tasks)
    (config.run_dir / "train.json").write_text(json_text(dataclasses.asdict(summary)) + "\n")
    return summary


def vllm_options(config: ModelConfig) -> VllmOptions | None:
    if config.server == "engine":
        return None
    return VllmOptions(names=config.names, args=config.args, transfer=config.transfer, replicas=config.replicas)
