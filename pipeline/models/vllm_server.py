"""A `ModelServer` of vLLM processes: one or several replicas, of which one at a time gets new weights.

A replica is updated by vLLM's native protocol: pause (what runs is frozen, and goes on afterwards) → start → update →
finish, which names the version → canary → resume. An update under running requests would kill the engine, and one that
failed must not be resumed upon: first the version before has to be back, or else the process starts anew with it.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from millstream.pipeline.addresses import free_port
from millstream.pipeline.models.server import UpdateFailed
from millstream.pipeline.models.vllm_process import PROBE_S, VllmOptions, VllmProcess
from millstream.pipeline.models.weights import Weights, allowed, check_fit, check_version, prune, save
from millstream.pipeline.protocols import model_version
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError, MillstreamError

if TYPE_CHECKING:  # needs the `train` extra
    from torch import Tensor

logger = logging.getLogger(__name__)

CALL_S: Final = 300.0  # for one call of the protocol
# A vLLM hangs that has left so many probes in a row unanswered, 20 s each. It answers between two steps. A step takes
# seconds at most, because long prompts are cut into pieces; a change of weights takes longer, and is not probed.
HUNG_PROBES: Final = 6
RESTART_S: Final = (1.0, 2.0, 5.0, 15.0, 60.0)  # between attempts to start a process that has ended
CANARY_PROMPT: Final = [1, 1]  # token ids; whatever they mean

_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError, RuntimeError, ConfigError)


class Replica:
    """One vLLM process with what it serves: ``good`` is the version that it comes back with when it is restarted, and
    ``adapters`` the LoRA adapters by the names they are served as."""

    def __init__(self, process: VllmProcess, options: VllmOptions, base: Weights) -> None:
        self.process = process
        self.good = base
        self.adapters: dict[str, Weights] = {}
        self.restarts = 0
        self._options = options
        self.shapes = base.shapes()
        self._session: aiohttp.ClientSession | None = None
        self._lock = asyncio.Lock()  # one change at a time
        self._keeper: asyncio.Task[None] | None = None
        self._gpu: Any = None

    @property
    def alive(self) -> bool:
        return self.process.pid is not None

    async def start(self) -> None:
        """Returns when it serves. Raises `MillstreamError` if it can't."""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=CALL_S),
            headers={"x-millstream-admin": self.process.token},
            connector=aiohttp.TCPConnector(force_close=True),  # after an error vLLM's server closes the connection
        )
        await self._begin()
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self.process.stop()
        if self._session is not None:
            await self._session.close()

    async def load(self, new: Weights, tensors: "Mapping[str, Tensor] | None" = None) -> None:
        """Raises `UpdateFailed` when the version before answers again instead, or vLLM is being started anew with it.
        ``tensors``: the same weights in memory, for transfers other than by file."""
        async with self._lock:
            self._check_alive()
            try:
                await self._swap(new, tensors)
            except _FAILURES as error:
                now = await self._restore(error)
                raise UpdateFailed(
                    f"{new.version} did not go live at {self.process.url}: {_said(error)}; {now}",
                    passing=not self.alive,
                ) from error
            self.good = new

    async def add_adapter(self, name: str, adapter: Weights) -> None:
        """Raises `UpdateFailed` if it does not answer; it is not served then."""
        async with self._lock:
            self._check_alive()
            if name in self.adapters:
                return
            try:
                await self._load_adapter(name, adapter)
            except _FAILURES as error:
                with suppress(*_FAILURES):
                    await self._post("/v1/unload_lora_adapter", {"lora_name": name})
                raise UpdateFailed(f"adapter {name} is not served at {self.process.url}: {_said(error)}") from error
            self.adapters[name] = adapter

    async def remove_adapter(self, name: str) -> None:
        async with self._lock:
            if self.adapters.pop(name, None) is not None and self.alive:
                with suppress(*_FAILURES):
                    await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def _check_alive(self) -> None:
        if not self.alive:
            raise UpdateFailed(
                f"vLLM at {self.process.url} is down, and being started again; see {self.process.log}", passing=True
            )

    async def _begin(self) -> None:
        """Until it has its weights, its middleware lets nobody in."""
        await self.process.start()
        self._gpu = None
        try:
            await self._swap(self.good)
        except _FAILURES as error:
            await self.process.kill()
            raise UpdateFailed(
                f"vLLM does not take {self.good.version}: {_said(error)}; see {self.process.log}"
            ) from error
        for name, adapter in list(self.adapters.items()):
            try:
                await self._load_adapter(name, adapter)
            except _FAILURES as error:
                logger.error("adapter %s is served no more at %s: %s", name, self.process.url, error)
                del self.adapters[name]

    async def _keep(self) -> None:
        """Starts it again whenever it has ended, or hangs."""
        tries = 0
        while True:
            if self.alive:
                logger.warning("vLLM at %s %s; it is started again", self.process.url, await self._down())
            async with self._lock:
                await self.process.kill()  # what it may have left behind
                try:
                    await self._begin()
                    self.restarts, tries = self.restarts + 1, 0
                    continue
                except (MillstreamError, OSError) as error:
                    logger.error("%s", error)
            await asyncio.sleep(RESTART_S[min(tries, len(RESTART_S) - 1)])
            tries += 1

    async def _down(self) -> str:
        """Returns when it has ended or hangs, and says which."""
        assert self._session is not None
        ended = asyncio.ensure_future(self.process.ended())
        missed = 0
        try:
            while missed < HUNG_PROBES:
                await asyncio.wait([ended], timeout=PROBE_S)
                if ended.done():
                    return f"ended with code {ended.result()}"
                async with self._lock:  # not while it is changed
                    missed = 0 if await self.process.answers(self._session) else missed + 1
            return f"has left {missed} probes without an answer"
        finally:
            ended.cancel()

    async def _swap(self, weights: Weights, tensors: "Mapping[str, Tensor] | None" = None) -> None:
        if tensors is None:  # files may have gone since they were written; vLLM would keep what it has in their place
            check_fit(await asyncio.to_thread(weights.shapes), self.shapes)
        await self._post("/pause", params={"mode": "keep"})
        if tensors is None or self._options.transfer == "file":
            await self._by_file(weights)
        else:
            await self._by_gpu(tensors, weights.version)
        found = await self._post("/collective_rpc", {"method": "millstream_canary"})
        if wrong := [text for text in found["results"] if text]:
            raise ValueError(f"the canary says: {wrong[0]}")
        await self._post("/resume")
        await self._canary(self._options.names[0], weights.version)

    async def _restore(self, cause: BaseException) -> str:
        """The version before, whatever state the engine is in; says how."""
        try:
            if isinstance(cause, TimeoutError):  # whatever did not return in time may still be at work
                raise cause
            await self._swap(self.good)
        except _FAILURES as error:
            await self.process.kill()  # `_keep` does the rest, when the lock is free
            return f"{self.good.version} can't be brought back ({_said(error)}), and vLLM is started anew with it"
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
            self._gpu = GpuSender(self._options.transfer, process.url, process.token, workers, free_port())
        await asyncio.to_thread(self._gpu.send, tensors, version)

    async def _load_adapter(self, name: str, adapter: Weights) -> None:
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter.folder)})
        await self._canary(name, adapter.version)

    async def _canary(self, name: str, version: str) -> None:
        """One completion. Raises ValueError unless that version answered, with a probability."""
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
        """The answer, and the version that made it. Raises ValueError with what vLLM says for any status but 200."""
        assert self._session is not None
        async with self._session.post(f"{self.process.url}{path}", json=body, params=params) as response:
            if response.status != 200:
                raise ValueError(f"{path}: {response.status} {(await response.text())[:500]}")
            served = response.headers.get(model_version.HEADER)
            json = response.content_type == "application/json"
            return (await response.json() if json else await response.text()), served


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__  # a time-out says nothing


class VllmServer:
    """The `ModelServer`. ``folder`` gets logs, and the versions of a trainer: the last two of them, to go back to."""

    def __init__(
        self,
        model: Path,
        options: VllmOptions,
        settings: Settings,
        folder: Path,
        *,
        version: str,
        port: int = 0,
    ) -> None:
        """``version`` names the weights of the model's folder. ``port`` is that of the first replica (0: any free one),
        the others follow it. Raises `ConfigError` if the folder is not to be loaded."""
        self._settings = settings
        self._folder = folder
        self._options = options
        self._root = settings.weights_root
        self.base = self.weights(model, version)
        processes = [
            VllmProcess(model, options, settings, folder / "log", f"vllm-{i}", port and port + i)
            for i in range(options.replicas)
        ]
        self.replicas = [Replica(process, options, self.base) for process in processes]
        self._lock = asyncio.Lock()

    @property
    def urls(self) -> list[str]:
        return [replica.process.url for replica in self.replicas]

    @property
    def version(self) -> str:
        """Of the whole model; adapters are served beside it."""
        return self.replicas[0].good.version

    @property
    def adapters(self) -> Mapping[str, Weights]:
        return self.replicas[0].adapters

    async def start(self, first: Weights | None = None, adapters: Mapping[str, Weights] | None = None) -> None:
        """Returns when all replicas serve: ``first`` instead of what the model's folder holds, and LoRA ``adapters`` by
        the names they are served as. Raises `MillstreamError` if one can't; none is left running then."""
        for replica in self.replicas:
            replica.good = first or self.base
            replica.adapters = dict(adapters or {})
        try:
            async with asyncio.TaskGroup() as group:
                for replica in self.replicas:
                    group.create_task(replica.start())
        except BaseException as error:
            await self.close()
            raise error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error from None

    async def close(self) -> None:
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    async def update(self, weights: "Mapping[str, Tensor]", version: str) -> None:
        """See `ModelServer.update`. They are written down first: a restart needs them."""
        check_version(version)
        check_fit({name: tuple(tensor.shape) for name, tensor in weights.items()}, self.replicas[0].shapes)
        saved = await asyncio.to_thread(save, self._folder / "versions", weights, version)
        before = self.replicas[0].good
        await self._everywhere(lambda replica: replica.load(saved, weights), lambda replica: replica.load(before))
        await asyncio.to_thread(prune, self._folder / "versions", [before, saved])

    def weights(self, folder: str | Path, version: str, *, lora: bool = False) -> Weights:
        """Raises `ConfigError` if they must not be loaded."""
        return allowed(folder, self._root, check_version(version), lora=lora)

    async def deploy(self, folder: Path, version: str, *, lora: bool = False) -> str:
        """The safetensors of a folder answer from now on; an adapter is added, as NAME@VERSION, to what is served.
        Returns the name that this version is served as. Raises `UpdateFailed`, or `ConfigError` if the folder must not
        be loaded."""
        found = self.weights(folder, version, lora=lora)
        name = self._options.names[0]
        if lora:
            if not self._options.adapters:
                raise ConfigError(f"{name} is served without LoRA adapters: start it with --adapters N")
            name = f"{name}@{version}"
            await self._everywhere(
                lambda replica: replica.add_adapter(name, found), lambda replica: replica.remove_adapter(name)
            )
        else:
            before = self.replicas[0].good
            check_fit(found.shapes(), self.replicas[0].shapes)
            await self._everywhere(lambda replica: replica.load(found), lambda replica: replica.load(before))
        return name

    async def remove_adapter(self, name: str) -> None:
        """Serves it no more."""
        for replica in self.replicas:
            await replica.remove_adapter(name)

    async def _everywhere(
        self, change: Callable[[Replica], Awaitable[None]], undo: Callable[[Replica], Awaitable[None]]
    ) -> None:
        """One replica after the other, so that the others answer meanwhile; all of them or none."""
        async with self._lock:
            done: list[Replica] = []
            for replica in self.replicas:
                try:
                    await change(replica)
                except UpdateFailed:
                    for other in done:
                        await undo(other)
                    raise
                done.append(replica)
