"""Imports the objects that users name: agents, hooks, adapters."""

import importlib
import sys
import traceback
from typing import Any

from millstream.schemas.errors import ConfigError
from millstream.schemas.spans.text import utf8


def load_object(what: str, path: str, folder: str) -> Any:
    """Imports ``module:attribute`` with ``folder`` first on the import path. ``what`` describes it in messages.

    Raises `ConfigError` naming the path and the cause.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{what} {path!r} is not of the form module:attribute, like examples.calculator.agent:agent")
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except BaseException as error:  # SystemExit too: a user's module may raise anything
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        # Where an existing module failed, its author needs to see.
        cause = "" if missing else "\n" + "".join(traceback.format_exception(error)).rstrip()
        raise ConfigError(
            f"{what} {path!r} can't be imported from {folder}: {type(error).__name__}: {error_message(error)}{cause}"
        ) from error
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise ConfigError(f"{what} {path!r}: {module_name} has no {attribute}") from None
    return found


def error_message(error: BaseException) -> str:
    try:
        return utf8(str(error))
    except Exception:  # an exception class of the agent's own may raise in __str__
        return "(its message can't be shown)"
