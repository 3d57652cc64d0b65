"""Finds the objects that users name: agents, adapters."""

import importlib
import sys
from pathlib import Path
from typing import Any

from millstream.schemas.errors import ConfigError


def load_object(path: str) -> Any:
    """``module:attribute``, found from the current folder. Raises `ConfigError` naming what can't be found."""
    module, _, attribute = path.partition(":")
    if not attribute:
        raise ConfigError(f"{path!r} names no attribute: write module:attribute")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path!r} can't be loaded: {error}") from error
