"""Millstream: train AI agents that already exist, over an event stream.

In an agent: `emit_reward`, `emit_span`; `attempt_environment` for the processes it starts. To train one: `Trainer` with
an algorithm such as `GRPO` (needs the ``train`` extra). What a rollout works with: `Resources`, `LLM`,
`PromptTemplate`. Code of yours around each attempt: `Hook`. To ask what happened: `Store`, such as
`ClickHouseStore(load_settings())`. To process the stream: `broker`. To keep it elsewhere: `Sink`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream.consumers.hooks import Hook
    from millstream.consumers.sink_port import Batch, Sink
    from millstream.consumers.triplets import Trace, TripletMaker, to_triplets
    from millstream.pipeline.algorithms.grpo import GRPO
    from millstream.pipeline.batches import Algorithm
    from millstream.pipeline.broker import broker
    from millstream.pipeline.hooks import ErrorHandler, PerformanceMonitor, StateBackup, WarmUp
    from millstream.pipeline.memory_store import MemoryStore
    from millstream.pipeline.store import ClickHouseStore
    from millstream.pipeline.store_port import AsyncStore, Attempt, Reward, Rollout, Store
    from millstream.pipeline.trainer import Trainer
    from millstream.producers.agent_environment import attempt_environment
    from millstream.producers.emit import emit_reward, emit_span
    from millstream.producers.state import load_state, save_state
    from millstream.producers.tracer import Tracer
    from millstream.schemas.records import Triplet
    from millstream.schemas.resources import LLM, PromptTemplate, Resources
    from millstream.schemas.settings import Settings, load_settings
    from millstream.schemas.triplet_rules import TripletRules

__all__ = [
    "GRPO",
    "LLM",
    "Algorithm",
    "AsyncStore",
    "Attempt",
    "Batch",
    "ClickHouseStore",
    "ErrorHandler",
    "Hook",
    "MemoryStore",
    "PerformanceMonitor",
    "PromptTemplate",
    "Resources",
    "Reward",
    "Rollout",
    "Settings",
    "Sink",
    "StateBackup",
    "Store",
    "Trace",
    "Tracer",
    "Trainer",
    "Triplet",
    "TripletMaker",
    "TripletRules",
    "WarmUp",
    "attempt_environment",
    "broker",
    "emit_reward",
    "emit_span",
    "load_settings",
    "load_state",
    "save_state",
    "to_triplets",
]

# Loaded at first use, so that importing any part of Millstream stays fast, and free of torch.
_HOMES = {
    "GRPO": "millstream.pipeline.algorithms.grpo",
    "LLM": "millstream.schemas.resources",
    "Algorithm": "millstream.pipeline.batches",
    "AsyncStore": "millstream.pipeline.store_port",
    "Attempt": "millstream.pipeline.store_port",
    "ClickHouseStore": "millstream.pipeline.store",
    "Batch": "millstream.consumers.sink_port",
    "ErrorHandler": "millstream.pipeline.hooks",
    "Hook": "millstream.consumers.hooks",
    "MemoryStore": "millstream.pipeline.memory_store",
    "PerformanceMonitor": "millstream.pipeline.hooks",
    "PromptTemplate": "millstream.schemas.resources",
    "Resources": "millstream.schemas.resources",
    "Reward": "millstream.pipeline.store_port",
    "Rollout": "millstream.pipeline.store_port",
    "Settings": "millstream.schemas.settings",
    "Sink": "millstream.consumers.sink_port",
    "StateBackup": "millstream.pipeline.hooks",
    "Store": "millstream.pipeline.store_port",
    "Trace": "millstream.consumers.triplets",
    "Tracer": "millstream.producers.tracer",
    "Trainer": "millstream.pipeline.trainer",
    "Triplet": "millstream.schemas.records",
    "TripletMaker": "millstream.consumers.triplets",
    "TripletRules": "millstream.schemas.triplet_rules",
    "WarmUp": "millstream.pipeline.hooks",
    "attempt_environment": "millstream.producers.agent_environment",
    "broker": "millstream.pipeline.broker",
    "emit_reward": "millstream.producers.emit",
    "emit_span": "millstream.producers.emit",
    "load_settings": "millstream.schemas.settings",
    "load_state": "millstream.producers.state",
    "save_state": "millstream.producers.state",
    "to_triplets": "millstream.consumers.triplets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
