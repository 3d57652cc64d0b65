"""Millstream: train AI agents that already exist, over an event stream.

In an agent: `emit_reward`, `emit_span` and their like, `operation`; clients of its own rollout, `openai_client` and
others; `attempt_environment` for the processes it starts. Around one: `Tracer`. To train one: `Trainer` with an
algorithm such as `GRPO` (needs the ``train`` extra). What a rollout works with: `Resources`, `LLM`, `PromptTemplate`.
Code of yours around each attempt: `Hook`. To ask what happened: `Store`, such as `ClickHouseStore(load_settings())`. To
process the stream: `broker`. To keep it elsewhere: `Sink`. Wrappers for agent frameworks: `integrations`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream import integrations
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
    from millstream.pipeline.traced_rollout import TracedRollout
    from millstream.pipeline.tracer import Tracer
    from millstream.pipeline.trainer import Trainer
    from millstream.producers.agent_environment import attempt_environment
    from millstream.producers.blob_store import Blobs
    from millstream.producers.clients import (
        anthropic_client,
        async_anthropic_client,
        async_openai_client,
        openai_client,
    )
    from millstream.producers.emit import (
        emit_annotation,
        emit_exception,
        emit_message,
        emit_object,
        emit_otel_span,
        emit_reward,
        emit_span,
    )
    from millstream.producers.operation import operation
    from millstream.producers.state import load_state, save_state
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
    "Blobs",
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
    "TracedRollout",
    "Tracer",
    "Trainer",
    "Triplet",
    "TripletMaker",
    "TripletRules",
    "WarmUp",
    "anthropic_client",
    "async_anthropic_client",
    "async_openai_client",
    "attempt_environment",
    "broker",
    "emit_annotation",
    "emit_exception",
    "emit_message",
    "emit_object",
    "emit_otel_span",
    "emit_reward",
    "emit_span",
    "integrations",
    "load_settings",
    "load_state",
    "openai_client",
    "operation",
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
    "Blobs": "millstream.producers.blob_store",
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
    "TracedRollout": "millstream.pipeline.traced_rollout",
    "Tracer": "millstream.pipeline.tracer",
    "Trainer": "millstream.pipeline.trainer",
    "Triplet": "millstream.schemas.records",
    "TripletMaker": "millstream.consumers.triplets",
    "TripletRules": "millstream.schemas.triplet_rules",
    "WarmUp": "millstream.pipeline.hooks",
    "anthropic_client": "millstream.producers.clients",
    "async_anthropic_client": "millstream.producers.clients",
    "async_openai_client": "millstream.producers.clients",
    "attempt_environment": "millstream.producers.agent_environment",
    "broker": "millstream.pipeline.broker",
    "emit_annotation": "millstream.producers.emit",
    "emit_exception": "millstream.producers.emit",
    "emit_message": "millstream.producers.emit",
    "emit_object": "millstream.producers.emit",
    "emit_otel_span": "millstream.producers.emit",
    "emit_reward": "millstream.producers.emit",
    "emit_span": "millstream.producers.emit",
    "load_settings": "millstream.schemas.settings",
    "load_state": "millstream.producers.state",
    "openai_client": "millstream.producers.clients",
    "operation": "millstream.producers.operation",
    "save_state": "millstream.producers.state",
    "to_triplets": "millstream.consumers.triplets",
}


def __getattr__(name: str) -> Any:
    if name == "integrations":
        return import_module("millstream.integrations")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
