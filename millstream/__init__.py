"""Millstream: train AI agents that already exist, over an event stream."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream.producers.emit import emit_reward, emit_span
    from millstream.producers.state import load_state, save_state

__all__ = ["emit_reward", "emit_span", "load_state", "save_state"]

# Loaded at first use, so that importing any part of Millstream stays fast.
_HOMES = {
    "emit_reward": "millstream.producers.emit",
    "emit_span": "millstream.producers.emit",
    "load_state": "millstream.producers.state",
    "save_state": "millstream.producers.state",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
