"""A CPU as one of verl's platforms, for tests: ranks over gloo, and a Ray GPU that exists in name only.

Loaded by ``VERL_USE_EXTERNAL_MODULES=cpu_platform`` with ``VERL_PLATFORM=cpu`` and ``VERL_ENGINE_DEVICE=cuda``. The
platform itself is registered as verl documents it. Below it are three patches, of what verl assumes about GPUs.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
import torch.distributed.fsdp
import transformers
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _Device(types.ModuleType):
    """As ``torch.cuda``: what `torch.cpu` has, and memory that is never full."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _no_bytes(*args: Any, **kwargs: Any) -> int:
    return 0


cpu = torch.device("cpu")
device = _Device("cpu_device")
for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
    setattr(device, name, _no_bytes)
for name in ("empty_cache", "reset_peak_memory_stats", "ipc_collect", "set_device"):
    setattr(device, name, _nothing)
device.mem_get_info = lambda *args: (0, 1)
device.get_rng_state = lambda *args: torch.get_rng_state()
device.set_rng_state = lambda state, *args: torch.set_rng_state(state)
device.manual_seed = device.manual_seed_all = torch.manual_seed
device.current_device = lambda: cpu
device.get_device_name = lambda *args: "cpu"
device.is_available = lambda: True
device.device_count = lambda: 1


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = device

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return cpu

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed
    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = _nothing

    def get_device_capability(self, device_id: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "MILLSTREAM_TEST_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, message: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "GPU"  # verl counts GPUs and NPUs only

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, float]:
        return {"num_gpus": num_gpus}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


_init_process_group = torch.distributed.init_process_group


def _one_backend(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
    """verl asks for gloo on the CPU and the platform's backend on its device: here both are the CPU."""
    return _init_process_group("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


torch.distributed.init_process_group = _one_backend

_from_pretrained = transformers.AutoModelForTokenClassification.from_pretrained


def _with_sdpa(*args: Any, **kwargs: Any) -> Any:
    """verl loads a critic with flash-attn, whatever the configuration says."""
    return _from_pretrained(*args, **(kwargs | {"attn_implementation": "sdpa"}))


transformers.AutoModelForTokenClassification.from_pretrained = _with_sdpa


class _Unpinned(torch.distributed.fsdp.CPUOffloadPolicy):
    """verl keeps a reference model in pinned memory, for which torch wants a driver of NVIDIA's."""

    def __init__(self, pin_memory: bool = True) -> None:
        super().__init__(pin_memory=False)


torch.distributed.fsdp.CPUOffloadPolicy = _Unpinned
