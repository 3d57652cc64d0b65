"""An `Algorithm` whose learning is a verl job: many GPUs, FSDP2 or Megatron, fed from our log.

The job runs on Ray in an environment of its own (setting ``verl_python``). This process serves the weights that it
publishes; the job asks for rollouts itself, over Kafka.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

from millstream.pipeline.algorithms.verl.config import Job, VerlOptions, check, latest_checkpoint
from millstream.pipeline.algorithms.verl.exchange import Exchange
from millstream.pipeline.models.vllm_process import die_with_parent
from millstream.schemas.config.settings import ENV_PREFIX, SECRETS, Settings
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.folders import make_folder

DRIVER: Final = "from millstream.pipeline.algorithms.verl.job import main; main()"


@dataclass(frozen=True, slots=True)
class JobPolicy:
    stop_s: float = 60.0  # for Ray to end its processes; then the driver is killed, and they end with it
    last_lines: int = 40  # of the job's log, in the error: Ray prints a stack twice


class Verl:
    """See `VerlOptions` for the arguments."""

    def __init__(self, model: str | Path, *, policy: JobPolicy = JobPolicy(), **options: Any) -> None:
        self.options = VerlOptions(model=Path(model).resolve(), **options)
        self.model = self.options.model
        self._policy = policy

    async def run(self, run: Any) -> None:
        """Trains until the run's last step, or until it has reached what it was for. Continues from the last complete
        checkpoint in the run's folder.

        Raises `ConfigError` before the start if the options or the settings can't work; `MillstreamError` with the last
        lines of the job's log if the job fails.
        """
        job = await asyncio.to_thread(self._prepared, run)
        exchange = Exchange(job.folder, job.attempt)
        async with self._process(run.settings.verl_python, job, run.settings) as process:
            served, reported = -1, 0
            while True:
                ended = process.returncode is not None  # before the look into the folder: nothing comes after it
                if (newest := exchange.newest()) is not None and newest > served:
                    await self._serve(run, exchange, newest)
                    served = newest
                lines = await asyncio.to_thread(_metrics, job)
                for line in lines[reported:]:
                    _report(run, json.loads(line))
                reported = len(lines)
                if ended:
                    break
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), exchange.policy.poll_s)
        if process.returncode != 0:
            raise MillstreamError(
                f"the verl job ended with exit code {process.returncode} ({_log(job)}):\n{self._last_lines(job)}"
            )

    def _prepared(self, run: Any) -> Job:
        """The job of this start, with its tasks in the run's folder."""
        check(self.options, len(run.tasks))
        python: Path = run.settings.verl_python
        if not python.is_file():
            raise ConfigError(f"no verl at {python} (setting verl_python); `make verl` sets it up")
        folder = make_folder((run.run_dir / "verl").resolve(), "run_dir")
        job = Job(
            options=self.options,
            run=run.name,
            experiment_id=run.experiment_id,
            seed=run.seed,
            steps=run.max_steps,
            attempt=token_hex(4),
            folder=folder,
            resume_from=latest_checkpoint(folder),
        )
        job.tasks_file.write_text("".join(f"{task}\n" for task in run.tasks), "utf-8")
        return job

    async def _serve(self, run: Any, exchange: Exchange, step: int) -> None:
        from safetensors.torch import load_file

        tensors = await asyncio.to_thread(load_file, exchange.weights_of(step))
        version = await run.publish_weights(tensors, step)
        await asyncio.to_thread(exchange.acknowledge, step, version)
        await asyncio.to_thread(exchange.remove_before, step)

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


def _metrics(job: Job) -> Sequence[str]:
    """What verl has logged: a line of JSON for each step."""
    if not job.metrics_file.exists():
        return []
    return job.metrics_file.read_text().split("\n")[:-1]  # the last one may be being written


def _report(run: Any, entry: dict[str, Any]) -> None:
    run.report(
        {name: float(value) for name, value in entry["data"].items() if isinstance(value, int | float)}, entry["step"]
    )


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
