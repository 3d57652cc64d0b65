"""The agent and its hooks: how they are configured, loaded, named and called."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from millstream.consumers.runner.hooks import Hook
from millstream.producers.agent.instrumentation import FRAMEWORKS
from millstream.producers.log_lines import LogFormat, LogLevel
from millstream.schemas.errors import ConfigError
from millstream.schemas.import_path import error_message, load_object

AgentFunction = Callable[..., Any]
AGENT_PARAMETERS = ("resources", "rollout")  # that an agent may have after its input


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What a host needs to run an agent. JSON, unless the agent or a hook is an object."""

    agent: str | AgentFunction  # module:attribute, or the callable
    folder: str  # where modules are looked for first
    worker_id: str
    proxy_urls: Sequence[str] = ()
    gateway_url: str = ""
    hooks: Sequence[Hook | str] = ()
    instrument: Sequence[str] = tuple(FRAMEWORKS)  # their names
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    one_at_a_time: bool = False  # a process runs one attempt at a time: a sync agent gets its main thread

    @property
    def name(self) -> str:
        return agent_name(self.agent)


def load_agent(agent: str | AgentFunction, folder: str) -> AgentFunction:
    """The callable at ``module:attribute``, with ``folder`` first on the import path.

    Raises `ConfigError` naming the path and the cause.
    """
    if not isinstance(agent, str):
        return agent
    found = load_object("agent", agent, folder)
    if not callable(found):
        raise ConfigError(f"agent {agent!r} is not callable: it is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def load_hook(hook: Hook | str, folder: str) -> Hook:
    """The hook at ``module:attribute``: an instance, a class, or a function that returns an instance.

    Raises `ConfigError` naming the path and the cause.
    """
    if isinstance(hook, Hook):
        return hook
    found = load_object("hook", hook, folder)
    if not isinstance(found, Hook) and callable(found):
        try:
            found = found()
        except Exception as error:
            reason = f"{type(error).__name__}: {error_message(error)}"
            raise ConfigError(f"hook {hook!r} can't be created: {reason}") from error
    if not isinstance(found, Hook):
        raise ConfigError(f"hook {hook!r} is not a millstream.Hook: it is a {type(found).__name__}")
    return found


def agent_name(agent: str | AgentFunction) -> str:
    """The agent's name in spans: ``module:attribute``."""
    if isinstance(agent, str):
        return agent
    agent = inspect.unwrap(agent)
    named = agent if hasattr(agent, "__qualname__") else type(agent)
    return f"{named.__module__}:{named.__qualname__}"


def is_async(agent: AgentFunction) -> bool:
    inner = agent
    while isinstance(inner, partial):
        inner = inner.func
    inner = inspect.unwrap(inner)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def optional_parameters(function: Callable[..., Any], names: Sequence[str]) -> tuple[str, ...]:
    """Which of ``names`` the function has as a parameter, after its first one."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C
        return ()
    by_name = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    by_name |= {p.name for p in parameters[1:] if p.kind is p.POSITIONAL_OR_KEYWORD}
    return tuple(name for name in names if name in by_name)
