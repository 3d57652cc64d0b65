"""Port: how the roles of a training run are put together. `deployment` has the implementations."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millstream.consumers.adapter.triplets import ToTriplets
from millstream.consumers.log.port import Log
from millstream.consumers.runner.hooks import Hook
from millstream.pipeline.models.server import ModelServer
from millstream.pipeline.models.vllm_process import VllmOptions
from millstream.schemas.config.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the roles of a run work with, as `Trainer` was given it."""

    settings: Settings
    agent: Any
    to_triplets: ToTriplets
    run_dir: Path
    model: Path | None = None
    hooks: Sequence[Hook | str] = ()
    vllm: VllmOptions | None = None
    deterministic: bool = False  # of the demo engine
    rollouts: bool = True  # False: there are none, so neither runner nor model server is needed
    # Called with the settings by which this process reaches the proxy, if the strategy starts the roles.
    on_proxy: Callable[[Settings], object] = lambda settings: None


# Entered, it runs the roles, and gives a log on which tasks are claimed and rollouts end, and the server of the model
# (None without a model).
Strategy = Callable[[Setup], AbstractAsyncContextManager[tuple[Log, ModelServer | None]]]
