"""A `ModelServer` of vLLM processes: one or several replicas, of which one at a time gets new weights."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from millstream.pipeline.models.server import UpdateFailed
from millstream.pipeline.models.vllm_process import DEFAULT_POLICY, VllmOptions, VllmPolicy, VllmProcess
from millstream.pipeline.models.vllm_replica import Replica
from millstream.pipeline.models.weight_files import Weights, allowed, check_fit, check_version, prune, save
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError

if TYPE_CHECKING:  # needs the `train` extra
    from torch import Tensor


class VllmServer:
    """The `ModelServer`. ``folder`` holds the logs and a trainer's last two versions, to go back to."""

    def __init__(
        self,
        model: Path,
        options: VllmOptions,
        settings: Settings,
        folder: Path,
        *,
        version: str,
        port: int = 0,
        policy: VllmPolicy = DEFAULT_POLICY,
    ) -> None:
        """``version`` names the weights of the model's folder. ``port`` is that of the first replica (0: any free one),
        the others follow it. Raises `ConfigError` if the folder must not be loaded."""
        self._settings = settings
        self._folder = folder
        self._options = options
        self._root = settings.weights_root
        self.base = self.weights(model, version)
        logs, gpus = folder / "log", options.gpus or ("",) * options.replicas
        processes = [
            VllmProcess(model, options, settings, logs, f"vllm-{i}", port and port + i, policy, gpus[i])
            for i in range(options.replicas)
        ]
        self.replicas = [Replica(process, options, self.base) for process in processes]
        self._lock = asyncio.Lock()

    @property
    def urls(self) -> list[str]:
        return [replica.process.url for replica in self.replicas]

    @property
    def version(self) -> str:
        """That of the whole model; adapters are served beside it."""
        return self.replicas[0].good.version

    @property
    def adapters(self) -> Mapping[str, Weights]:
        return self.replicas[0].adapters

    async def start(self, first: Weights | None = None, adapters: Mapping[str, Weights] | None = None) -> None:
        """Returns when all replicas serve: ``first`` instead of what the model's folder holds, and LoRA ``adapters`` by
        the names they are served as. Raises `MillstreamError` if one can't; then none is left running."""
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
        """See `ModelServer.update`. The weights are saved first, because a restart needs them."""
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
        """Stops serving it."""
        for replica in self.replicas:
            await replica.remove_adapter(name)

    async def _everywhere(
        self, change: Callable[[Replica], Awaitable[None]], undo: Callable[[Replica], Awaitable[None]]
    ) -> None:
        """Changes one replica after the other, so that the others answer meanwhile; all of them or none."""
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
