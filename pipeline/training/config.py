"""``millstream train CONFIG.toml``: a training run from a file."""

import asyncio
import dataclasses
import json
import logging
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console

from millstream.consumers.log.port import Log
from millstream.pipeline.algorithms.options import PROMPTS, Options, Rft, Supervision, Torch, algorithm_of, type_of
from millstream.pipeline.models.server import ModelServer
from millstream.pipeline.models.vllm_process import Transfer, VllmOptions
from millstream.pipeline.prompts.options import PromptConfig
from millstream.pipeline.prompts.versions import best_prompts
from millstream.pipeline.services.role_process import role_process
from millstream.pipeline.training.curriculum import TABLE, Leaving, stages_of
from millstream.pipeline.training.deployment import store_settings, strategy_of
from millstream.pipeline.training.report import StepReport, Summary
from millstream.pipeline.training.reporting.metrics import TrainingMetrics
from millstream.pipeline.training.reporting.progress import ProgressView
from millstream.pipeline.training.reporting.record import RECORD, obstacles
from millstream.pipeline.training.run import CHECKPOINTS
from millstream.pipeline.training.strategy import Setup, Strategy
from millstream.pipeline.training.trainer import Trainer
from millstream.pipeline.ui.serve import serving_pages
from millstream.producers.files import write_atomically
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.control import PromptTemplate
from millstream.schemas.errors import ConfigError, problems_of
from millstream.schemas.folders import make_folder
from millstream.schemas.import_path import load_object
from millstream.schemas.spans.text import json_text, parsed

logger = logging.getLogger(__name__)

RESOLVED, SUMMARY = "resolved.toml", "train.json"  # within the run's folder
ENDED: Final = "ended.toml"  # the same for a stage of a curriculum that has ended: its resolved file

# Types that can't learn from recorded rollouts, and what does.
OWN_ROLLOUTS: Final = {
    "rft": "type sft imitates the best of recorded ones",
    "verl": "its job asks for them; the other types learn from recorded ones",
    **{type_of(each): "policies learn from recorded ones" for each in PROMPTS},
}
LEAVING: Final = Leaving(
    models=frozenset(type_of(each) for each in (*get_args(Torch), Rft, *get_args(Supervision))),
    recorded=frozenset(type_of(each) for each in get_args(Supervision)),
    prompts=frozenset(type_of(each) for each in PROMPTS),
)


class ModelConfig(BaseModel):
    """The server of the policy: the demo engine, or vLLM processes that the trainer starts on this machine."""

    model_config = ConfigDict(extra="forbid")

    server: Literal["engine", "vllm"] = Field(default="engine", description="The demo engine, or vLLM.")
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
    gpus: tuple[str, ...] = Field(
        default=(), description='GPUs of each replica, such as "0,1", "2,3"; without any, each sees all.'
    )
    transfer: Transfer = Field(
        default="file", description="How new weights reach vLLM; nccl and ipc are not tested on GPUs."
    )


class ReportConfig(BaseModel):
    """Where the numbers of steps go, besides the log and the store."""

    model_config = ConfigDict(extra="forbid")

    tensorboard: bool = Field(
        default=False, description="Events in run_dir/tensorboard; needs the package tensorboard."
    )


class TrainConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    run: str = Field("run", pattern=r"^[A-Za-z0-9_-]+$", description="First part of every model version.")
    run_dir: Path = Field(Path("runs/default"), description="Folder of store, checkpoints and records.")
    strategy: Literal["memory", "kafka"] = Field(
        "kafka", description="memory: all roles in this process; kafka: each in its own."
    )
    agent: str | None = Field(None, description="module:attribute; over Kafka the runners load it.")
    hooks: list[str] = Field([], description="module:attribute of each, in order; needs `agent`.")
    tasks: Path | None = Field(None, description="JSON lines, as for `publish`. Recorded rollouts need none.")
    val_tasks: Path | None = Field(None, description="Tasks to validate with; they are never trained on.")
    max_steps: int | None = Field(
        None, ge=0, description="Default: 100; of recorded rollouts, those of all passes; of apo, its rounds."
    )
    stop_reward: float | None = Field(None, description="Mean reward of a step at which training ends early.")
    patience: int = Field(3, ge=1, description="Steps in a row that reach `stop_reward`.")
    seed: int = Field(0, description="Order of tasks, ids and seeds of rollouts.")
    model: ModelConfig = Field(ModelConfig(), description="The model's server.")
    report: ReportConfig = Field(ReportConfig(), description="Where numbers of steps go.")
    resume: str = Field(
        "auto",
        description='"auto": from the last checkpoint in run_dir; "never": refuses a folder with checkpoints; or a '
        'checkpoint, such as "step-42".',
    )
    prompts: dict[str, PromptConfig] = Field(
        {}, description="Templates that agents read as resources[NAME]; a search begins with them."
    )
    prompts_from: Path | None = Field(
        None, description="Folder of a run that has searched: its best templates take the place of those in `prompts`."
    )
    algorithm: Options = Field(description="How the policy, or the prompt, gets better.")

    @model_validator(mode="before")
    @classmethod
    def _table_of_a_type(cls, given: Any) -> Any:
        return _with_type(given)

    @model_validator(mode="after")
    def _tasks_of_the_type(self) -> "TrainConfig":
        if self.tasks is None and getattr(self.algorithm, "data", None) is None:
            raise ValueError("tasks: a file of them is needed, except to learn from recorded rollouts")
        return self

    @model_validator(mode="after")
    def _prompts_of_the_type(self) -> "TrainConfig":
        if isinstance(self.algorithm, PROMPTS) and self.val_tasks is None:
            raise ValueError(f"val_tasks: type {self.algorithm.type} compares its candidates on them")
        if isinstance(self.algorithm, PROMPTS) and not self.prompts and self.prompts_from is None:
            raise ValueError(f"prompts: type {self.algorithm.type} needs a table [prompts.NAME] to begin with")
        return self

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


def with_pages(strategy: Strategy, port: int, say: Callable[[str], object]) -> Strategy:
    """The strategy of a run in memory with pages for a browser at ``port`` of this machine, 0 for any free one: only
    the process that holds an embedded store can show it. ``say`` gets their address."""

    @asynccontextmanager
    async def running(setup: Setup) -> AsyncIterator[tuple[Log, ModelServer | None]]:
        async with strategy(setup) as (log, server):
            with serving_pages(store_settings(setup), log, port=port) as address:
                say(address)
                yield log, server

    return running


def _with_type(given: Any) -> Any:
    """``[grpo]`` and ``[verl]`` are short for ``[algorithm]`` with that type."""
    for name in ("grpo", "verl"):
        if isinstance(given, dict) and "algorithm" not in given and isinstance(given.get(name), dict):
            rest = {key: value for key, value in given.items() if key != name}
            return rest | {"algorithm": {**given[name], "type": name}}
    return given


def _from_experiment(given: dict[str, Any], experiment: str) -> dict[str, Any]:
    """The file with this experiment as the one that its algorithm learns from."""
    given = _with_type(given)
    table = given.get("algorithm")
    if not isinstance(table, dict):
        return given  # which is refused
    if (kind := table.get("type")) in OWN_ROLLOUTS:
        raise ConfigError(f"--from-experiment: type {kind} makes its own rollouts; {OWN_ROLLOUTS[kind]}")
    data = table.get("data")
    chosen = {**(data if isinstance(data, dict) else {}), "experiment": experiment}
    return given | {"algorithm": {**table, "data": chosen}}


def load_config(path: Path, from_experiment: str | None = None) -> TrainConfig:
    """As `load_stages`, of a file without a curriculum."""
    config, *more = load_stages(path, from_experiment)
    if more:
        raise ConfigError(f"{path} holds a curriculum of {len(more) + 1} stages, where one training is asked for")
    return config


def load_stages(path: Path, from_experiment: str | None = None) -> list[TrainConfig]:
    """One configuration, or that of each stage of a curriculum. ``from_experiment``: in place of
    ``algorithm.data.experiment``, in the first stage. Raises `ConfigError` naming the file and each wrong entry."""
    try:
        given = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        stages = stages_of(_with_type(given), LEAVING) if TABLE in given else [given]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if from_experiment is not None:
        stages[0] = _from_experiment(stages[0], from_experiment)
    found = []
    for number, stage in enumerate(stages, 1):
        try:
            found.append(TrainConfig(**stage))
        except ValidationError as error:
            which = f"stage {number} of the curriculum: " * (TABLE in given)
            raise ConfigError(f"{path}: {which}{problems_of(error)}") from None
    return found


def read_inputs(path: Path, settings: Settings) -> list[Any]:
    """The inputs of a tasks file, in order."""
    from millstream.producers.tasks import read_tasks

    return [parsed(task.input) for task in read_tasks(path, settings)[0]]


def dry_run(path: Path, from_experiment: str | None = None) -> tuple[str, dict[str, Any]]:
    """Checks everything that `train_from` needs on this machine, the model included, and starts nothing. Writes the
    file with all defaults to ``resolved.toml`` in the run's folder; returns its text and the experiment's record. Of a
    curriculum: the texts of all stages, and their records as ``stages``. What a stage needs of the ones before it is
    checked when these have ended.

    Raises `ConfigError` for whatever would be refused.
    """
    configs = load_stages(path, from_experiment)
    found = [_checked(path, config, waits=bool(number)) for number, config in enumerate(configs)]
    if len(configs) == 1:
        return found[0]
    titles = [f"# Stage {number} of {len(configs)}, run {each.run}" for number, each in enumerate(configs, 1)]
    text = "\n".join(f"{title}\n\n{resolved}" for title, (resolved, _) in zip(titles, found, strict=True))
    return text, {"stages": [record for _, record in found]}


def _checked(path: Path, config: TrainConfig, *, waits: bool) -> tuple[str, dict[str, Any]]:
    """See `dry_run`. ``waits``: for stages before it, unless its model is there."""
    _reports(config)
    settings = load_settings()
    text = resolved(config)
    if repr(TrainConfig(**tomllib.loads(text))) != repr(config):
        raise ConfigError(f"{path}: the resolved file would mean something else; please report this")
    needs = [path for path in (getattr(config.algorithm, "model", None), config.prompts_from) if path is not None]
    missing = [str(path) for path in needs if not path.exists()]
    if waits and missing:
        for tasks in filter(None, (config.tasks, config.val_tasks)):
            read_inputs(tasks, settings)
        record: dict[str, Any] = {"run": config.run, "config": config.model_dump(mode="json"), "waits_for": missing}
    else:
        record = _trainer(config, settings).check()
    _write(config)
    return text, record


def again(record: Mapping[str, Any], run_dir: Path | None = None, *, force: bool = False) -> Path:
    """Prepares the run of a record a second time, in a folder of its own (by default that of the first with
    ``-again``), and returns the file to train from.

    Raises `ConfigError` for a record without a file, for a folder that is taken, and, without ``force``, if a rollout
    or an update would now be computed from anything else: names each difference.
    """
    if record.get("config") is None:
        raise ConfigError("its record holds no training file: a script has started it; run the script again")
    try:
        first = TrainConfig(**record["config"])
    except ValidationError as error:
        raise ConfigError(f"the configuration in its record is not one of this version: {problems_of(error)}") from None
    where = run_dir or first.run_dir.with_name(f"{first.run_dir.name}-again")
    if (where / RECORD).exists() or (where / CHECKPOINTS).exists():
        raise ConfigError(f"{where} is the folder of a run: give the reproduction a new one with --run-dir")
    config = first.model_copy(update={"run_dir": where, "resume": "auto"})
    found = obstacles(record, _trainer(config, load_settings()).check())
    if found and not force:
        listed = "".join(f"\n  {each}" for each in found)
        raise ConfigError(f"the run can't be reproduced as it was; --force starts it all the same:{listed}")
    for each in found:
        logger.warning("%s", each)
    if (record.get("git") or {}).get("dirty"):
        logger.warning("the first run was started with uncommitted changes, which its record does not hold")
    return _write(config)


def resolved(config: TrainConfig) -> str:
    """The file with all defaults."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _write(config: TrainConfig) -> Path:
    """Writes it into the run's folder."""
    file = make_folder(config.run_dir, "run_dir") / RESOLVED
    write_atomically(file, resolved(config).encode())
    return file


def train_from(
    path: Path,
    console: Console | None = None,
    adapter: str = "",
    health_port: int = 0,
    from_experiment: str | None = None,
    ui_port: int | None = None,
) -> Summary:
    """Trains with a live view and writes the summary to ``train.json`` in the run's folder. ``adapter`` is
    ``module:attribute`` of a function from traces to triplets, for runs in memory. ``health_port``:
    as `role_process` serves it. ``from_experiment``: see `load_stages`. ``ui_port``: as
    `with_pages` serves a run in memory; None: no pages.

    Of a curriculum it trains the stages in their order, without those that an earlier call has ended, and returns the
    summary of the last.

    Raises `ConfigError` if the file is wrong or the `train` extra is missing.
    """
    configs = load_stages(path, from_experiment)
    console = console or Console()
    summary = None
    for number, config in enumerate(configs):
        if len(configs) > 1:
            if (summary := _ended(config)) is not None:
                logger.info("stage %d of %d, run %s, has ended before", number + 1, len(configs), config.run)
                continue
            _refuse_begun(config, configs[number + 1 :])
            console.print(f"stage {number + 1} of {len(configs)}: {config.run}", highlight=False)
        summary = _train(config, console, adapter, health_port, ui_port)
        if len(configs) > 1:
            write_atomically(config.run_dir / ENDED, resolved(config).encode())
    assert summary is not None
    return summary


def _ended(config: TrainConfig) -> Summary | None:
    """What a stage has ended with before, unless it was another one."""
    try:
        same = (config.run_dir / ENDED).read_text("utf-8") == resolved(config)
        return Summary.of(json.loads((config.run_dir / SUMMARY).read_text("utf-8"))) if same else None
    except FileNotFoundError:
        return None


def _refuse_begun(config: TrainConfig, later: Sequence[TrainConfig]) -> None:
    """Stages that have begun with the result of another one can't go on with this one's."""
    begun = [each.run for each in later if (each.run_dir / CHECKPOINTS).exists()]
    if begun:
        raise ConfigError(
            f"stage {config.run} is another than the one whose result {', '.join(begun)} began with: give the "
            "curriculum a new run_dir, or undo the change"
        )


def _train(config: TrainConfig, console: Console, adapter: str, health_port: int, ui_port: int | None) -> Summary:
    reports = _reports(config)
    metrics = TrainingMetrics()
    settings = load_settings()
    strategy = strategy_of(config.strategy)
    if ui_port is not None:
        if config.strategy != "memory":
            raise ConfigError("--ui-port is for runs in memory; over Kafka start `millstream ui`")
        say = partial(console.print, highlight=False, soft_wrap=True)
        strategy = with_pages(strategy, ui_port, lambda address: say(f"watch it in a browser: {address}"))
    with ProgressView(console, config.run) as view:
        trainer = _trainer(
            config,
            settings,
            with_probes(strategy, health_port, metrics),
            adapter=load_object("adapter", adapter, str(Path.cwd())) if adapter else None,
            on_step=lambda report: [each(report) for each in (view.on_step, metrics.ended, *reports)],
        )
        make_folder(config.run_dir, "run_dir")
        probes = f"; probes at http://{settings.health_host}:{health_port}" * bool(health_port)
        log = f"Kafka at {settings.kafka_bootstrap_servers}" if config.strategy == "kafka" else "one process"
        logger.info("this is the trainer of run %s in %s: %s%s", config.run, config.run_dir, log, probes)
        summary = trainer.fit()
    (config.run_dir / SUMMARY).write_text(json_text(dataclasses.asdict(summary)) + "\n")
    return summary


def _reports(config: TrainConfig) -> list[Callable[[StepReport], None]]:
    if not config.report.tensorboard:
        return []
    from millstream.pipeline.training.reporting.tensorboard import tensorboard  # needs torch

    return [tensorboard(config.run_dir)]


def _trainer(config: TrainConfig, settings: Settings, strategy: Strategy | None = None, **given: Any) -> Trainer:
    """``strategy``: by default the one that the file names. Loads the model."""
    return Trainer(
        tasks=read_inputs(config.tasks, settings) if config.tasks else [],
        val_tasks=read_inputs(config.val_tasks, settings) if config.val_tasks else [],
        algorithm=algorithm_of(config.algorithm, settings),
        agent=config.agent,
        strategy=strategy or config.strategy,
        hooks=config.hooks,
        max_steps=config.max_steps,
        stop_reward=config.stop_reward,
        patience=config.patience,
        run=config.run,
        run_dir=config.run_dir,
        resume=config.resume,
        seed=config.seed,
        settings=settings,
        vllm=vllm_options(config.model),
        deterministic=config.model.deterministic,
        prompts=_prompts(config),
        config=config.model_dump(mode="json"),
        **given,
    )


def _prompts(config: TrainConfig) -> dict[str, PromptTemplate]:
    given = {name: each.read(name) for name, each in config.prompts.items()}
    return given if config.prompts_from is None else given | best_prompts(config.prompts_from)


def vllm_options(config: ModelConfig) -> VllmOptions | None:
    if config.server == "engine":
        return None
    return VllmOptions(
        names=config.names, args=config.args, transfer=config.transfer, replicas=config.replicas, gpus=config.gpus
    )
