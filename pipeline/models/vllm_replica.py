"""One vLLM process that is kept running and gets new weights.

Weights change by vLLM's native protocol: pause (running requests are frozen, and go on afterwards) → start → update →
finish, which names the version → canary → resume. An update under running requests would kill the engine. After a
failed update the engine is never resumed with what it has: the version before is loaded again, or else the process is
restarted with it.
"""

import asyncio
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from millstream.pipeline.addresses import free_port
from millstream.pipeline.models.server import UpdateFailed
from millstream.pipeline.models.vllm_process import VllmOptions, VllmProcess
from millstream.pipeline.models.weight_files import Weights, check_fit
from millstream.pipeline.protocols import model_version
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas.errors import ConfigError, MillstreamError

if TYPE_CHECKING:  # needs the `train` extra
    from torch import Tensor

logger = logging.getLogger(__name__)

CANARY_PROMPT: Final = [1, 1]  # token ids that every model has

_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError, RuntimeError, ConfigError)


class Replica:
    """Keeps a vLLM running. ``good`` is the version that it serves and gets again after a restart, ``adapters`` are the
    LoRA adapters by the names they are served as."""

    def __init__(self, process: VllmProcess, options: VllmOptions, base: Weights) -> None:
        self.process = process
        self.good = base
        self.adapters: dict[str, Weights] = {}
        self.restarts = 0
        self._options = options
        self.shapes = base.shapes()
        self._session: aiohttp.ClientSession | None = None
        self._lock = asyncio.Lock()  # one change at a time
        self._keeper: Background | None = None
        self._gpu: Any = None

    @property
    def alive(self) -> bool:
        return self.process.pid is not None

    async def start(self) -> None:
        """Returns when it serves. Raises `MillstreamError` if it can't."""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self.process.policy.call_s),
            headers={"x-millstream-admin": self.process.token},
            connector=aiohttp.TCPConnector(force_close=True),  # after an error vLLM's server closes the connection
        )
        await self._begin()
        self._keeper = supervisor().loop(f"keeper of {self.process.url}", self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            await self._keeper.close()
        await self.process.stop()
        if self._session is not None:
            await self._session.close()

    async def load(self, new: Weights, tensors: "Mapping[str, Tensor] | None" = None) -> None:
        """Raises `UpdateFailed` when the version before answers again instead, or vLLM is being restarted with it.
        ``tensors``: the same weights in memory, for transfers other than by file."""
        async with self._lock:
            self._check_alive()
            try:
                await self._swap(new, tensors)
            except _FAILURES as error:
                now = await self._restore(error)
                raise UpdateFailed(
                    f"{new.version} did not go live at {self.process.url}: {_text(error)}; {now}",
                    passing=not self.alive,
                ) from error
            self.good = new

    async def add_adapter(self, name: str, adapter: Weights) -> None:
        """Raises `UpdateFailed` if it does not answer; then it is not served."""
        async with self._lock:
            self._check_alive()
            if name in self.adapters:
                return
            try:
                await self._load_adapter(name, adapter)
            except _FAILURES as error:
                with suppress(*_FAILURES):
                    await self._post("/v1/unload_lora_adapter", {"lora_name": name})
                raise UpdateFailed(f"adapter {name} is not served at {self.process.url}: {_text(error)}") from error
            self.adapters[name] = adapter

    async def remove_adapter(self, name: str) -> None:
        async with self._lock:
            if self.adapters.pop(name, None) is not None and self.alive:
                with suppress(*_FAILURES):
                    await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def _check_alive(self) -> None:
        if not self.alive:
            raise UpdateFailed(
                f"vLLM at {self.process.url} is down and being restarted; see {self.process.log}", passing=True
            )

    async def _begin(self) -> None:
        """Its middleware refuses requests until it has its weights."""
        await self.process.start()
        self._gpu = None
        try:
            await self._swap(self.good)
        except _FAILURES as error:
            await self.process.kill()
            raise UpdateFailed(
                f"vLLM does not load {self.good.version}: {_text(error)}; see {self.process.log}"
            ) from error
        for name, adapter in list(self.adapters.items()):
            try:
                await self._load_adapter(name, adapter)
            except _FAILURES as error:
                logger.error("adapter %s is no longer served at %s: %s", name, self.process.url, error)
                del self.adapters[name]

    async def _keep(self) -> None:
        """Restarts it whenever it has ended or hangs."""
        delays, tries = self.process.policy.restart_s, 0
        while True:
            if self.alive:
                logger.warning("vLLM at %s %s; it is restarted", self.process.url, await self._until_down())
            async with self._lock:
                await self.process.kill()  # and what it may have left behind
                try:
                    await self._begin()
                    self.restarts, tries = self.restarts + 1, 0
                    continue
                except (MillstreamError, OSError) as error:
                    logger.error("%s", error)
            await asyncio.sleep(delays[min(tries, len(delays) - 1)])
            tries += 1

    async def _until_down(self) -> str:
        """Returns which when it has ended or hangs."""
        assert self._session is not None
        ended = asyncio.ensure_future(self.process.ended())
        missed = 0
        try:
            while missed < self.process.policy.hung_probes:
                await asyncio.wait([ended], timeout=self.process.policy.probe_s)
                if ended.done():
                    return f"ended with code {ended.result()}"
                async with self._lock:  # not during a change
                    missed = 0 if await self.process.answers(self._session) else missed + 1
            return f"has not answered {missed} probes"
        finally:
            ended.cancel()

    async def _swap(self, weights: Weights, tensors: "Mapping[str, Tensor] | None" = None) -> None:
        if tensors is None:  # a file may be gone since; vLLM would keep the old weights in its place
            check_fit(await asyncio.to_thread(weights.shapes), self.shapes)
        await self._post("/pause", params={"mode": "keep"})
        if tensors is None or self._options.transfer == "file":
            await self._by_file(weights)
        else:
            await self._by_gpu(tensors, weights.version)
        found = await self._post("/collective_rpc", {"method": "millstream_canary"})
        if wrong := [text for text in found["results"] if text]:
            raise ValueError(f"the canary reports: {wrong[0]}")
        await self._post("/resume")
        await self._canary(self._options.names[0], weights.version)

    async def _restore(self, cause: BaseException) -> str:
        """Loads the version before, whatever state the engine is in. Returns the outcome."""
        try:
            if isinstance(cause, TimeoutError):  # what did not return in time may still be at work
                raise cause
            await self._swap(self.good)
        except _FAILURES as error:
            await self.process.kill()  # `_keep` restarts it when the lock is free
            return f"{self.good.version} can't be brought back ({_text(error)}); vLLM is restarted with it"
        return f"{self.good.version} is back"

    async def _by_file(self, weights: Weights) -> None:
        """vLLM sees the folder at the same path."""
        await self._post("/start_weight_update")
        files = await asyncio.to_thread(weights.checksums)
        await self._post("/update_weights", {"update_info": {"files": files}})
        await self._post("/finish_weight_update", {"weight_version": weights.version})

    async def _by_gpu(self, tensors: "Mapping[str, Tensor]", version: str) -> None:
        from millstream.pipeline.models.vllm_gpu import GpuSender  # needs vLLM here

        if self._gpu is None:
            workers = await self._workers()
            process = self.process
            self._gpu = GpuSender(
                self._options.transfer, process.url, process.token, workers, free_port(), process.policy.call_s
            )
        await asyncio.to_thread(self._gpu.send, tensors, version)

    async def _load_adapter(self, name: str, adapter: Weights) -> None:
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter.folder)})
        await self._canary(name, adapter.version)

    async def _canary(self, name: str, version: str) -> None:
        """Asks for one token. Raises ValueError unless that version answers, with a finite log-probability."""
        request = {"model": name, "prompt": CANARY_PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 0}
        answer, served = await self._call("/v1/completions", request)
        logprob = answer["choices"][0]["logprobs"]["token_logprobs"][0]
        if served != version or not math.isfinite(logprob):
            raise ValueError(f"the canary was answered by {served} with log-probability {logprob}")

    async def _workers(self) -> int:
        assert self._session is not None
        async with self._session.get(f"{self.process.url}/get_world_size") as response:
            return int((await response.json())["world_size"])

    async def _post(
        self, path: str, body: dict[str, Any] | None = None, params: Mapping[str, str] | None = None
    ) -> Any:
        return (await self._call(path, body, params))[0]

    async def _call(
        self, path: str, body: dict[str, Any] | None = None, params: Mapping[str, str] | None = None
    ) -> tuple[Any, str | None]:
        """The answer, and the version that made it. Raises ValueError with vLLM's message for any status but 200."""
        assert self._session is not None
        async with self._session.post(f"{self.process.url}{path}", json=body, params=params) as response:
            if response.status != 200:
                raise ValueError(f"{path}: {response.status} {(await response.text())[:500]}")
            served = response.headers.get(model_version.HEADER)
            json = response.content_type == "application/json"
            return (await response.json() if json else await response.text()), served


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__  # a time-out has no text
