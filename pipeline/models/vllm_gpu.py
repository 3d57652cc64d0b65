"""Sends weights from a trainer's GPU to vLLM's by NCCL or CUDA IPC, with vLLM's own trainer side. UNTESTED ON GPU.

Needs vLLM in the trainer's environment. Written against https://docs.vllm.ai/en/latest/training/weight_transfer: its
`trainer_init` connects to the workers once, and `send_weights` makes the calls start, update and finish.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import requests
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo


class GpuSender:
    """For one vLLM process. One thread at a time."""

    def __init__(self, transfer: str, url: str, token: str, workers: int, port: int, call_s: float) -> None:
        """``port``: a free one of this machine, for NCCL's rendezvous. ``call_s``: for one call."""
        info: Any = IPCTrainerInitInfo(rank=0)
        if transfer == "nccl":
            info = NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=port, world_size=workers + 1)
        self._info = info
        self._client = _Client(url, token, call_s)
        self._source = _Source()
        self._engine: Any = None

    def send(self, tensors: Mapping[str, Tensor], version: str) -> None:
        """Starts, updates and finishes. ``tensors`` are on a GPU. Raises what requests and vLLM raise."""
        self._source.tensors, self._client.version = tensors, version
        if self._engine is None:
            self._engine = WeightTransferTrainerFactory.trainer_init(
                self._info, client=self._client, source=self._source
            )
        self._engine.send_weights()


class _Source(WeightSource):  # type: ignore[misc]
    tensors: Mapping[str, Tensor]

    def metadata(self) -> list[Any]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


class _Client(HTTPVLLMWeightSyncClient):  # type: ignore[misc]
    """vLLM's client, with this server's token and the version's name."""

    version = ""

    def __init__(self, url: str, token: str, call_s: float) -> None:
        super().__init__(url, call_s)
        self._token = token
        self._call_s = call_s

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        headers = {"x-millstream-admin": self._token}
        requests.post(f"{self.base_url}/{path}", json=json, headers=headers, timeout=self._call_s).raise_for_status()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        super().finish_weight_update(weight_version or self.version)
