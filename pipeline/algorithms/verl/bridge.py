"""What each process of a verl job loads of ours: the tasks that it draws, and the way of its weights to us.

`Tasks` is ``data.custom_cls``, `Weights` a ``CheckpointEngine``: two of verl's extension points.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.checkpoint_engine.base import CheckpointEngine

from millstream.pipeline.algorithms.verl.config import NAME
from millstream.pipeline.algorithms.verl.exchange import Exchange


class Tasks(Dataset[dict[str, Any]]):
    """Tasks of agents, a JSON text a line. They are no chat prompts: agents make their own."""

    def __init__(self, data_files: Any, tokenizer: Any, processor: Any, config: Any, max_samples: int = -1) -> None:
        path = data_files if isinstance(data_files, str) else data_files[0]
        self._tasks = Path(path).read_text("utf-8").splitlines()

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # verl gives a batch its size by a tensor.
        return {"raw_prompt": self._tasks[index], "index": index, "data_source": NAME, "size": torch.zeros(1)}


@CheckpointEngineRegistry.register(NAME)
class Weights(CheckpointEngine):  # type: ignore[misc] # verl has no types
    """Writes each step's weights to the job's folder, for the trainer's process to serve."""

    def __init__(self, bucket_size: int, is_master: bool, folder: str, attempt: str) -> None:
        self._is_master = is_master
        self._exchange = Exchange(Path(folder), attempt)

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None, **_: Any
    ) -> dict[str, float]:
        """Every rank iterates over all weights, since each tensor is gathered from all; the first one writes."""
        assert global_steps is not None
        began = time.monotonic()
        tensors = {}
        for name, tensor in weights:
            if self._is_master:
                # A copy: the next tensor may take this one's memory, and the file may hold none that share theirs.
                tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if self._is_master:
            self._exchange.write(global_steps, tensors)
        return {"millstream/weights_s": time.monotonic() - began}

    # The rest of the protocol is for verl's own rollout servers: there are none.

    async def receive_weights(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("weights are served by the trainer's process")

    def prepare(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build_topology(cls, *_: Any, **__: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {}

    def init_process_group(self, **_: Any) -> None: ...

    def finalize(self) -> None: ...
