"""Extension of vLLM's workers (``--worker-extension-cls millstream_worker.Worker``): weights as files.

Importing it registers the weight-transfer engines ``millstream`` (for any device), ``millstream_nccl`` and
``millstream_ipc``: vLLM's own, which take files as well. The last two are untested on GPU.

It runs in vLLM's environment, where millstream is not installed, and imports nothing of it.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

ROOT_VARIABLE = "MILLSTREAM_WEIGHTS_ROOT"  # files lie below it
CANARY_TOKENS = 8


class Worker:
    """Methods for ``/collective_rpc``. vLLM mixes it into its worker class."""

    def millstream_canary(self) -> str:
        """Runs the model once, with attention, outside the scheduler, so that paused requests stay paused. Returns what
        is wrong: a parameter or a result that is not a number."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        for name, parameter in runner.model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"{name} holds values that are not numbers"
        hidden, _ = runner._dummy_run(CANARY_TOKENS, force_attention=True)
        return "" if torch.isfinite(hidden).all() else "what the model computes is not a number"


class _Files:
    """An engine that also takes ``{"files": {path: sha256}}``. All files are checked before the model is touched."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "files" in update_info:
            self._load([tensor for path, digest in update_info["files"].items() for tensor in _read(path, digest)])
        else:
            super().update_weights(update_info)  # type: ignore[misc]

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        model: Any = self.model  # type: ignore[attr-defined]
        try:
            model.load_weights(weights)
        except Exception:
            for layer in model.modules():  # these tensors must not count towards the next update
                info = get_layerwise_info(layer)
                if info.can_load():
                    info.load_numel, info.loaded_weights = 0, []
            raise


class FileEngine(_Files, WeightTransferEngine):  # type: ignore[misc]
    """Files alone."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = WeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Nothing to prepare."""

    def start_weight_update(self) -> None:
        # Without it, load_weights fails on a CPU: there the weights have been packed for its kernels.
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # The output layer multiplies by a copy packed for its kernel. If it shares the embedding's weights, none
            # are loaded into it, so the copy has to be renewed here.
            for layer in self.model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:
        raise NotImplementedError("the update names no files")

    def shutdown(self) -> None:
        """There is nothing to close."""


class NcclEngine(_Files, NCCLWeightTransferEngine):  # type: ignore[misc]
    """Untested on GPU."""


class IpcEngine(_Files, IPCWeightTransferEngine):  # type: ignore[misc]
    """Untested on GPU."""


def _read(path: str, sha256: str) -> list[tuple[str, torch.Tensor]]:
    root = Path(os.environ[ROOT_VARIABLE]).resolve()
    file = Path(path).resolve()
    if file.suffix != ".safetensors" or not file.is_relative_to(root):
        raise ValueError(f"{path} is not a safetensors file below {root}")
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != sha256:
            raise ValueError(f"{path} does not have the announced checksum")
    return sorted(load_file(file).items())


WeightTransferEngineFactory.register_engine("millstream", FileEngine)
WeightTransferEngineFactory.register_engine("millstream_nccl", NcclEngine)
WeightTransferEngineFactory.register_engine("millstream_ipc", IpcEngine)
