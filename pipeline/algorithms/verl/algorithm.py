"""An `Algorithm` whose learning is a verl job: many GPUs, FSDP2 or Megatron, fed from our log.

The job runs on Ray in an environment of its own (setting ``verl_python``). This process serves the weights that it
publishes; the job asks for rollouts itself, over Kafka.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final

from millstream.pipeline.algorithms.verl.config import Job, VerlOptions, check, checkpoint_of, mark_of
from millstream.pipeline.algorithms.verl.exchange import Exchange
from millstream.pipeline.models.vllm_process import die_with_parent
from millstream.pipeline.training.report import StepReport
from millstream.pipeline.training.run import Run
from millstream.schemas.config.settings import ENV_PREFIX, SECRETS, Settings
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.folders import make_folder

if TYPE_CHECKING:  # needs the `train` extra
    from torch import Tensor

DRIVER: Final = "from millstream.pipeline.algorithms.verl.job import main; main()"


@dataclass(frozen=True, slots=True)
class JobPolicy:
    stop_s: float = 60.0  # for Ray to end its processes; then the driver is killed, and they end with it
    last_lines: int = 40  # of the job's log, in the error: Ray prints a stack twice


class Verl:
    """See `VerlOptions` for the arguments."""

    python_setting = "verl_python"  # names the interpreter that learns

    def __init__(self, model: str | Path, *, policy: JobPolicy = JobPolicy(), **options: Any) -> None:
        self.options = VerlOptions(model=Path(model).resolve(), **options)
        self.model = self.options.model
        self._policy = policy

    async def run(self, run: Run) -> None:
        """See `Algorithm.run`.

        Raises `ConfigError` before the start if the options or the settings can't work; `MillstreamError` with the last
        lines of the job's log if the job fails.
        """
        job = await asyncio.to_thread(self._prepared, run)
        exchange = Exchange(job.folder, job.attempt)
        progress = _Progress(run, job, exchange)
        async with self._process(run.settings.verl_python, job, run.settings) as process:
            served = -1
            while True:
                ended = process.returncode is not None  # before the look into the folder: nothing comes after it
                await progress.report()
                if (newest := exchange.newest()) is not None and newest > served:
                    await self._serve(run, job, exchange, newest, progress)
                    served = newest
                if ended:
                    break
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), exchange.policy.poll_s)
        if process.returncode != 0:
            raise MillstreamError(
                f"the verl job ended with exit code {process.returncode} ({_log(job)}):\n{self._last_lines(job)}"
            )
        if run.experiment.val_tasks and progress.validated != served:
            await progress.validate(served)

    def check(self, settings: Settings, tasks: int) -> None:
        """Raises `ConfigError` for what would fail after verl's long start."""
        check(self.options, tasks)
        if not settings.verl_python.is_file():
            raise ConfigError(f"no verl at {settings.verl_python} (setting verl_python); `make verl` sets it up")

    def _prepared(self, run: Run) -> Job:
        """The job of this start, with its tasks in the run's folder."""
        self.check(run.settings, len(run.experiment.tasks))
        folder = make_folder((run.run_dir / "verl").resolve(), "run_dir")
        resume_from = None if run.restored is None else checkpoint_of(folder, run.restored.step)
        if resume_from is not None and mark_of(resume_from) is None:
            raise ConfigError(
                f"{resume_from} is not a complete checkpoint of verl: go on from another one (resume = …)"
            )
        job = Job(
            options=self.options,
            run=run.experiment.name,
            experiment_id=run.experiment.experiment_id,
            started_ns=run.experiment.started_ns,
            seed=run.seed,
            steps=run.experiment.stop.max_steps,
            attempt=token_hex(4),
            folder=folder,
            resume_from=resume_from,
        )
        job.tasks_file.write_text("".join(f"{task}\n" for task in run.experiment.tasks), "utf-8")
        return job

    async def _serve(self, run: Run, job: Job, exchange: Exchange, step: int, progress: "_Progress") -> None:
        """Serves the weights of a step. If verl has written its checkpoint of them, the run has one, too: it names the
        step to go on from."""
        weights = await asyncio.to_thread(self._read, exchange.weights_of(step))
        mark = await asyncio.to_thread(mark_of, checkpoint_of(job.folder, step))
        if mark is not None and mark["attempt"] == job.attempt:
            await run.checkpoint(step, {"weights": weights}, {}, keep=self.options.keep)
        await run.publish_weights(weights, step)
        stop = await progress.reached(step)
        await asyncio.to_thread(exchange.acknowledge, step, run.resources_id, run.lineage, stop)
        await asyncio.to_thread(exchange.remove_before, step)

    def _read(self, path: Path) -> dict[str, "Tensor"]:
        """Weights as a model server wants them: tied ones once. verl publishes an output layer in any case."""
        from safetensors.torch import load_file
        from transformers import AutoConfig

        weights = load_file(path)
        if AutoConfig.from_pretrained(self.model).get_text_config().tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights

    @asynccontextmanager
    async def _process(self, python: Path, job: Job, settings: Settings) -> AsyncIterator[asyncio.subprocess.Process]:
        """The job's driver. It has ended when this returns or raises, and Ray's processes with it."""
        given = json.dumps({"job": json.loads(job.to_json()), "settings": _revealed(settings)})
        with _log(job).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                python,
                "-c",
                DRIVER,
                env=_environment(self.options),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        try:
            assert process.stdin is not None
            process.stdin.write(given.encode() + b"\n")
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), self._policy.stop_s)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    def _last_lines(self, job: Job) -> str:
        return "\n".join(_log(job).read_text(errors="replace").splitlines()[-self._policy.last_lines :])


@dataclass
class _Progress:
    """Reports what verl logs, a line of JSON for each step, and knows when the run has reached what it was for."""

    run: Run
    job: Job
    exchange: Exchange
    reported: int = 0  # lines
    validated: int = -1  # step
    rewards: list[float] = field(default_factory=list)  # since the last validation that fell short
    began: float = field(default_factory=time.monotonic)

    async def report(self) -> None:
        lines = await asyncio.to_thread(self._lines)
        for line in lines[self.reported :]:
            entry = json.loads(line)
            values = {name: float(v) for name, v in entry["data"].items() if isinstance(v, int | float)}
            await self._report(entry["step"], values)
        self.reported = len(lines)

    async def reached(self, step: int) -> bool:
        """Whether the job may end, with the weights of ``step``; validates them if its rewards say so."""
        stop = self.run.experiment.stop
        if not stop.reached(self.rewards):
            return False
        if not self.run.experiment.val_tasks or stop.good_enough(await self.validate(step)):
            return True
        self.rewards.clear()
        return False

    async def validate(self, step: int) -> float:
        reward = await self.run.validate()
        self.validated = step
        return reward

    def _lines(self) -> list[str]:
        if not self.job.metrics_file.exists():
            return []
        return self.job.metrics_file.read_text("utf-8").split("\n")[:-1]  # the last one may be being written

    async def _report(self, step: int, values: dict[str, float]) -> None:
        summary = self.run.summary
        rollouts = int(values.pop("millstream/rollouts"))
        summary.rollouts += rollouts
        summary.spans += int(values.pop("millstream/spans"))
        self.rewards.append(values["millstream/reward"])
        now = time.monotonic()
        trained = await asyncio.to_thread(self.exchange.trained, step)
        await self.run.report(
            StepReport(
                step=step - 1,
                model_version=replace(self.run.lineage, step=step - 1).version,
                reward=values.pop("millstream/reward"),
                rollouts=rollouts,
                failed=int(values.pop("millstream/failed")),
                rollouts_per_second=summary.rollouts / self.run.seconds,
                spans=summary.spans,
                seconds=now - self.began,
                metrics=values,
                groups=len(trained),
            ),
            [rollout for rollouts in trained.values() for rollout in rollouts],
        )
        self.began = now


def _log(job: Job) -> Path:
    return job.folder / "job.log"


def _revealed(settings: Settings) -> dict[str, Any]:
    """What was set, passwords included, as JSON."""
    values = settings.model_dump(mode="json", exclude_unset=True, exclude=set(SECRETS))
    secrets = SECRETS & settings.model_fields_set
    return values | {name: getattr(settings, name).get_secret_value() for name in secrets}


def _environment(options: VerlOptions) -> dict[str, str]:
    """Without our settings: the job is given them."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # an error that all ranks have is then seen with its rank
        "TOKENIZERS_PARALLELISM": "false",
        "HYDRA_FULL_ERROR": "1",
        "HF_HUB_OFFLINE": "1",  # models are folders
        **({"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}),  # ranks share the cores
        **inherited,
    }
