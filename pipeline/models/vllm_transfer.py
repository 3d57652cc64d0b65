"""How weights reach a paused vLLM: as files that it reads, or as tensors by gloo. (NCCL and CUDA IPC: `vllm_gpu`.)

Each is a way of making the one call ``/update_weights`` of vLLM's native weight-transfer protocol.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from millstream.pipeline.addresses import LOOPBACK
from millstream.pipeline.models.weights import Weights

if TYPE_CHECKING:  # needs the `train` extra
    from torch import Tensor

Post = Callable[[str, dict[str, Any] | None], Awaitable[Any]]  # to a path of vLLM, with the admin token
GLOO_S = 60.0


async def send_file(post: Post, weights: Weights) -> None:
    """The safetensors of a folder that vLLM sees at the same path."""
    files = await asyncio.to_thread(weights.checksums)
    await post("/update_weights", {"update_info": {"files": files}})


async def send_gloo(post: Post, tensors: Mapping[str, "Tensor"], workers: int) -> None:
    """A process group of its own for each update: nothing is left that a restart could break."""
    import torch

    dist: Any = torch.distributed  # its stubs lack half of it
    timeout = timedelta(seconds=GLOO_S)
    store = dist.TCPStore(LOOPBACK, 0, workers + 1, is_master=True, wait_for_workers=False, timeout=timeout)
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def digest() -> str:
        made = hashlib.sha256()
        for tensor in flat.values():
            made.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return made.hexdigest()

    def broadcast() -> None:
        group = dist.ProcessGroupGloo(store, 0, workers + 1, timeout)
        for tensor in flat.values():
            group.broadcast(tensor, 0).wait()

    info = {
        "host": LOOPBACK,
        "port": store.port,
        "tensors": [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in flat.items()],
        "sha256": await asyncio.to_thread(digest),
    }
    receiving = asyncio.ensure_future(post("/update_weights", {"update_info": {"gloo": info}}))
    await asyncio.gather(asyncio.to_thread(broadcast), receiving)
