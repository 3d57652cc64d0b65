"""Millstream: train AI agents that already exist, over an event stream.

In an agent: `emit_reward`, `emit_span`. To train one: `Trainer` with an algorithm such as `GRPO` (needs the ``train``
extra). What a rollout works with: `Resources`, `LLM`, `PromptTemplate`. To ask what happened: `Store`. To process the
stream: `broker`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream.consumers.triplets import Trace, to_triplets
    from millstream.pipeline.algorithms.grpo import GRPO
    from millstream.pipeline.batches import Algorithm
    from millstream.pipeline.broker import broker
    from millstream.pipeline.store import Store
    from millstream.pipeline.trainer import Trainer
    from millstream.producers.emit import emit_reward, emit_span
    from millstream.producers.tracer import Tracer
    from millstream.schemas.records import Triplet
    from millstream.schemas.resources import LLM, PromptTemplate, Resources
    from millstream.schemas.settings import Settings, load_settings

__all__ = [
    "GRPO",
    "LLM",
    "Algorithm",
    "PromptTemplate",
    "Resources",
    "Settings",
    "Store",
    "Trace",
    "Tracer",
    "Trainer",
    "Triplet",
    "broker",
    "emit_reward",
    "emit_span",
    "load_settings",
    "to_triplets",
]

# Loaded at first use, so that importing any part of Millstream stays fast, and free of torch.
_HOMES = {
    "GRPO": "millstream.pipeline.algorithms.grpo",
    "LLM": "millstream.schemas.resources",
    "Algorithm": "millstream.pipeline.batches",
    "PromptTemplate": "millstream.schemas.resources",
    "Resources": "millstream.schemas.resources",
    "Settings": "millstream.schemas.settings",
    "Store": "millstream.pipeline.store",
    "Trace": "millstream.consumers.triplets",
    "Tracer": "millstream.producers.tracer",
    "Trainer": "millstream.pipeline.trainer",
    "Triplet": "millstream.schemas.records",
    "broker": "millstream.pipeline.broker",
    "emit_reward": "millstream.producers.emit",
    "emit_span": "millstream.producers.emit",
    "load_settings": "millstream.schemas.settings",
    "to_triplets": "millstream.consumers.triplets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
