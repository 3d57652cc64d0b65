"""Millstream: train AI agents that already exist, over an event stream.

In an agent: `emit_reward`, `emit_span` and their like, `operation`; clients of its own rollout, `openai_client` and
others; `attempt_environment` for the processes it starts. Around one: `Tracer`; a model that rewards it: `Judge`, or
a `Rubric` of groups. To train one: `Trainer` with an algorithm such as `GRPO` (needs the ``train`` extra), or one of
your own: an `algorithm` function of a `Run`, or a `Learner` in the loop `PolicyGradient`. What a rollout works with:
`Resources`, `LLM`, `PromptTemplate`. Code of yours around each attempt: `Hook`. To ask what happened: `Store`, such
as `ClickHouseStore(load_settings())`. To process the stream: `broker`. To keep it elsewhere: `Sink`. Wrappers for
agent frameworks: `integrations`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream import integrations as integrations
    from millstream.consumers.adapter.triplets import Trace as Trace
    from millstream.consumers.adapter.triplets import TripletMaker as TripletMaker
    from millstream.consumers.adapter.triplets import to_triplets as to_triplets
    from millstream.consumers.runner.hooks import Hook as Hook
    from millstream.consumers.sink.port import Batch as Batch
    from millstream.consumers.sink.port import Sink as Sink
    from millstream.pipeline.algorithms.grpo import GRPO as GRPO
    from millstream.pipeline.algorithms.policy_gradient import PolicyGradient as PolicyGradient
    from millstream.pipeline.services.faststream.broker import broker as broker
    from millstream.pipeline.store.clickhouse import ClickHouseStore as ClickHouseStore
    from millstream.pipeline.store.results import Attempt as Attempt
    from millstream.pipeline.store.results import Reward as Reward
    from millstream.pipeline.store.results import Rollout as Rollout
    from millstream.pipeline.store.results import Store as Store
    from millstream.pipeline.tracing.judge import Judge as Judge
    from millstream.pipeline.tracing.rubric import Rubric as Rubric
    from millstream.pipeline.tracing.traced_rollout import TracedRollout as TracedRollout
    from millstream.pipeline.tracing.tracer import Tracer as Tracer
    from millstream.pipeline.training.algorithm import Algorithm as Algorithm
    from millstream.pipeline.training.algorithm import Learner as Learner
    from millstream.pipeline.training.algorithm import algorithm as algorithm
    from millstream.pipeline.training.run import Run as Run
    from millstream.pipeline.training.trainer import Trainer as Trainer
    from millstream.producers.agent.child_environment import attempt_environment as attempt_environment
    from millstream.producers.agent.clients import anthropic_client as anthropic_client
    from millstream.producers.agent.clients import async_anthropic_client as async_anthropic_client
    from millstream.producers.agent.clients import async_openai_client as async_openai_client
    from millstream.producers.agent.clients import openai_client as openai_client
    from millstream.producers.agent.emit import emit_annotation as emit_annotation
    from millstream.producers.agent.emit import emit_exception as emit_exception
    from millstream.producers.agent.emit import emit_message as emit_message
    from millstream.producers.agent.emit import emit_object as emit_object
    from millstream.producers.agent.emit import emit_otel_span as emit_otel_span
    from millstream.producers.agent.emit import emit_reward as emit_reward
    from millstream.producers.agent.emit import emit_span as emit_span
    from millstream.producers.agent.operation import operation as operation
    from millstream.producers.agent.state import load_state as load_state
    from millstream.producers.agent.state import save_state as save_state
    from millstream.producers.blob_store import Blobs as Blobs
    from millstream.schemas.config.settings import Settings as Settings
    from millstream.schemas.config.settings import load_settings as load_settings
    from millstream.schemas.config.triplet_rules import TripletRules as TripletRules
    from millstream.schemas.control import LLM as LLM
    from millstream.schemas.control import PromptTemplate as PromptTemplate
    from millstream.schemas.control import Resources as Resources
    from millstream.schemas.wire.records import Triplet as Triplet

# Loaded at first use, so that importing any part of Millstream stays fast, and free of torch.
_NAMES = {
    "consumers.runner.hooks": "Hook",
    "consumers.sink.port": "Batch Sink",
    "consumers.adapter.triplets": "Trace TripletMaker to_triplets",
    "pipeline.algorithms.grpo": "GRPO",
    "pipeline.algorithms.policy_gradient": "PolicyGradient",
    "pipeline.training.algorithm": "Algorithm Learner algorithm",
    "pipeline.training.run": "Run",
    "pipeline.services.faststream.broker": "broker",
    "pipeline.store.clickhouse": "ClickHouseStore",
    "pipeline.store.results": "Attempt Reward Rollout Store",
    "pipeline.tracing.judge": "Judge",
    "pipeline.tracing.rubric": "Rubric",
    "pipeline.tracing.traced_rollout": "TracedRollout",
    "pipeline.tracing.tracer": "Tracer",
    "pipeline.training.trainer": "Trainer",
    "producers.agent.child_environment": "attempt_environment",
    "producers.blob_store": "Blobs",
    "producers.agent.clients": "anthropic_client async_anthropic_client async_openai_client openai_client",
    "producers.agent.emit": (
        "emit_annotation emit_exception emit_message emit_object emit_otel_span emit_reward emit_span"
    ),
    "producers.agent.operation": "operation",
    "producers.agent.state": "load_state save_state",
    "schemas.wire.records": "Triplet",
    "schemas.control": "LLM PromptTemplate Resources",
    "schemas.config.settings": "Settings load_settings",
    "schemas.config.triplet_rules": "TripletRules",
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
