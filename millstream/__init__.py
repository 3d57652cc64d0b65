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
    from millstream import integrations as integrations
    from millstream.consumers.hooks import Hook as Hook
    from millstream.consumers.sink_port import Batch as Batch
    from millstream.consumers.sink_port import Sink as Sink
    from millstream.consumers.triplets import Trace as Trace
    from millstream.consumers.triplets import TripletMaker as TripletMaker
    from millstream.consumers.triplets import to_triplets as to_triplets
    from millstream.pipeline.algorithms.grpo import GRPO as GRPO
    from millstream.pipeline.batches import Algorithm as Algorithm
    from millstream.pipeline.broker import broker as broker
    from millstream.pipeline.hooks import ErrorHandler as ErrorHandler
    from millstream.pipeline.hooks import PerformanceMonitor as PerformanceMonitor
    from millstream.pipeline.hooks import StateBackup as StateBackup
    from millstream.pipeline.hooks import WarmUp as WarmUp
    from millstream.pipeline.memory_store import MemoryStore as MemoryStore
    from millstream.pipeline.store import ClickHouseStore as ClickHouseStore
    from millstream.pipeline.store_port import AsyncStore as AsyncStore
    from millstream.pipeline.store_port import Attempt as Attempt
    from millstream.pipeline.store_port import Reward as Reward
    from millstream.pipeline.store_port import Rollout as Rollout
    from millstream.pipeline.store_port import Store as Store
    from millstream.pipeline.traced_rollout import TracedRollout as TracedRollout
    from millstream.pipeline.tracer import Tracer as Tracer
    from millstream.pipeline.trainer import Trainer as Trainer
    from millstream.producers.agent_environment import attempt_environment as attempt_environment
    from millstream.producers.blob_store import Blobs as Blobs
    from millstream.producers.clients import anthropic_client as anthropic_client
    from millstream.producers.clients import async_anthropic_client as async_anthropic_client
    from millstream.producers.clients import async_openai_client as async_openai_client
    from millstream.producers.clients import openai_client as openai_client
    from millstream.producers.emit import emit_annotation as emit_annotation
    from millstream.producers.emit import emit_exception as emit_exception
    from millstream.producers.emit import emit_message as emit_message
    from millstream.producers.emit import emit_object as emit_object
    from millstream.producers.emit import emit_otel_span as emit_otel_span
    from millstream.producers.emit import emit_reward as emit_reward
    from millstream.producers.emit import emit_span as emit_span
    from millstream.producers.operation import operation as operation
    from millstream.producers.state import load_state as load_state
    from millstream.producers.state import save_state as save_state
    from millstream.schemas.records import Triplet as Triplet
    from millstream.schemas.resources import LLM as LLM
    from millstream.schemas.resources import PromptTemplate as PromptTemplate
    from millstream.schemas.resources import Resources as Resources
    from millstream.schemas.settings import Settings as Settings
    from millstream.schemas.settings import load_settings as load_settings
    from millstream.schemas.triplet_rules import TripletRules as TripletRules

# Loaded at first use, so that importing any part of Millstream stays fast, and free of torch.
_NAMES = {
    "consumers.hooks": "Hook",
    "consumers.sink_port": "Batch Sink",
    "consumers.triplets": "Trace TripletMaker to_triplets",
    "pipeline.algorithms.grpo": "GRPO",
    "pipeline.batches": "Algorithm",
    "pipeline.broker": "broker",
    "pipeline.hooks": "ErrorHandler PerformanceMonitor StateBackup WarmUp",
    "pipeline.memory_store": "MemoryStore",
    "pipeline.store": "ClickHouseStore",
    "pipeline.store_port": "AsyncStore Attempt Reward Rollout Store",
    "pipeline.traced_rollout": "TracedRollout",
    "pipeline.tracer": "Tracer",
    "pipeline.trainer": "Trainer",
    "producers.agent_environment": "attempt_environment",
    "producers.blob_store": "Blobs",
    "producers.clients": "anthropic_client async_anthropic_client async_openai_client openai_client",
    "producers.emit": "emit_annotation emit_exception emit_message emit_object emit_otel_span emit_reward emit_span",
    "producers.operation": "operation",
    "producers.state": "load_state save_state",
    "schemas.records": "Triplet",
    "schemas.resources": "LLM PromptTemplate Resources",
    "schemas.settings": "Settings load_settings",
    "schemas.triplet_rules": "TripletRules",
}
_HOMES = {name: f"millstream.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOMES, "integrations"]


def __getattr__(name: str) -> Any:
    if name == "integrations":
        return import_module("millstream.integrations")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
