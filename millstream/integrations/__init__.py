"""Wrappers that give more control over a framework than tracing alone: `langchain`, `autogen`. Each needs its framework
(``pip install 'millstream[frameworks]'``), and is imported at first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millstream.integrations import autogen, langchain

__all__ = ["autogen", "langchain"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
