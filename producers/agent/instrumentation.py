"""Instruments the frameworks that agents use. A missing or failing instrumentation only logs a warning."""

import inspect
import logging
import re
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import wrapt
from opentelemetry.instrumentation.threading import ThreadingInstrumentor
from opentelemetry.trace import TracerProvider

from millstream.producers.agent.shared_threads import follow_threads
from millstream.schemas.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Framework:
    """A package that agents use, and its instrumentation."""

    name: str  # for --instrument
    module: str  # importing it triggers the instrumentation
    instrumentor: str  # module:class, with the interface of an OpenTelemetry instrumentor
    requirement: str  # pip requirement of the instrumentation
    options: Mapping[str, Any] = field(default_factory=dict)

    def installed(self) -> bool:
        return find_spec(self.module.partition(".")[0]) is not None

    def traceable(self) -> bool:
        """Whether its instrumentation is installed."""
        try:
            metadata.version(re.split("[=<>]", self.requirement)[0])
        except metadata.PackageNotFoundError:
            return False
        return True


_GENAI = "opentelemetry.instrumentation.genai"
_GENAI_PACKAGE = "opentelemetry-instrumentation-genai"

# Beta releases, pinned to the versions tested together (the extra `frameworks`).
FRAMEWORKS = {
    framework.name: framework
    for framework in (
        Framework("openai", "openai", f"{_GENAI}.openai:OpenAIInstrumentor", f"{_GENAI_PACKAGE}-openai==1.3b0"),
        Framework(
            "anthropic", "anthropic", f"{_GENAI}.anthropic:AnthropicInstrumentor", f"{_GENAI_PACKAGE}-anthropic==1.3b0"
        ),
        # Covers LangGraph, which uses LangChain's callbacks.
        Framework(
            "langchain",
            "langchain_core",
            f"{_GENAI}.langchain:LangChainInstrumentor",
            f"{_GENAI_PACKAGE}-langchain==1.3b0",
        ),
        Framework(
            "openai-agents",
            "agents.tracing",  # not "agents", which may be a package of the user
            f"{_GENAI}.openai_agents:OpenAIAgentsInstrumentor",
            f"{_GENAI_PACKAGE}-openai-agents==1.3b0",
            options={"disable_openai_trace_export": True},  # else it sends every trace to OpenAI, with our key
        ),
        Framework(
            "autogen",
            "autogen_agentchat",
            "millstream.producers.agent.autogen:AutogenInstrumentor",
            "autogen-agentchat>=0.7.5,<0.8",
        ),
        Framework(
            "crewai",
            "crewai",
            "openinference.instrumentation.crewai:CrewAIInstrumentor",
            "openinference-instrumentation-crewai==1.1.21",
        ),
    )
}

_hooked: set[str] = set()


def chosen(names: str | None) -> tuple[str, ...]:
    """Parses ``--instrument``: a comma-separated list of `FRAMEWORKS`, ``none``, or None for all of them.

    Raises `ConfigError` for an unknown name or an empty list.
    """
    if names is None:
        return tuple(FRAMEWORKS)
    asked = tuple(name.strip() for name in names.split(",") if name.strip())
    if asked == ("none",):
        return ()
    for name in asked:
        if name not in FRAMEWORKS:
            raise ConfigError(f"--instrument {names}: known are {', '.join(FRAMEWORKS)}; or none, alone")
    if not asked:
        raise ConfigError(f"--instrument is empty: known are {', '.join(FRAMEWORKS)}; or none, alone")
    return asked


def report(names: Iterable[str]) -> None:
    """Logs which frameworks are traced, and which lack their instrumentation."""
    installed = [FRAMEWORKS[name] for name in names if FRAMEWORKS[name].installed()]
    traced = [framework.name for framework in installed if framework.traceable()]
    logger.info("instruments on import: %s", ", ".join(traced) or "nothing")
    for framework in installed:
        if not framework.traceable():
            logger.warning(
                "%s is installed, but its calls can't be traced: pip install %s", framework.name, framework.requirement
            )


def instrument(provider: TracerProvider, names: Iterable[str]) -> None:
    """Makes threads inherit the context, and instruments each of these frameworks when the agent imports it. Later
    calls don't change the provider of a framework: the first one serves every attempt."""
    threads = ThreadingInstrumentor()
    if not threads.is_instrumented_by_opentelemetry:
        threads.instrument()
        follow_threads()
    for name in names:
        framework = FRAMEWORKS[name]
        if name not in _hooked and framework.traceable():
            _hooked.add(name)
            wrapt.register_post_import_hook(partial(_instrument, provider, framework), framework.module)


def _instrument(provider: TracerProvider, framework: Framework, module: ModuleType) -> None:
    where, _, name = framework.instrumentor.partition(":")
    try:
        instrumentor = getattr(import_module(where), name)()
        _guard_calls(where)
        instrumentor.instrument(tracer_provider=provider, raise_exception_on_conflict=True, **framework.options)
        _guard_streams()
    except Exception as error:  # a third-party beta release may raise anything
        logger.warning(
            "the calls of %s can't be traced (%s: %s): pip install %s",
            framework.name,
            type(error).__name__,
            error,
            framework.requirement,
        )


def _guard_calls(package: str) -> None:
    """Keeps a fault in the instrumentation of a call from the agent that makes it: in what it reads of the request
    before the call, and of the answer after it. For the wrappers that the package's modules install from now on."""
    for name, module in list(sys.modules.items()):
        wrap = getattr(module, "wrap_function_wrapper", None) if f"{name}.".startswith(f"{package}.") else None
        if wrap is not None and not hasattr(wrap, "__wrapped__"):
            module.wrap_function_wrapper = _guarding(wrap)  # type: ignore[attr-defined]


def _guarding(wrap: Callable[[Any, str, Callable[..., Any]], Any]) -> Callable[[Any, str, Callable[..., Any]], Any]:
    @wraps(wrap)
    def guarding(target: Any, name: str, wrapper: Callable[..., Any]) -> Any:
        def guarded(wrapped: Callable[..., Any], _instance: Any, args: Any, kwargs: Any) -> Any:
            call = _Call(wrapped)
            try:
                result = wrapper(call.run, _instance, args, kwargs)
            except Exception as error:
                return call.instead_of(error, args, kwargs)
            return call.awaited(result, args, kwargs) if inspect.iscoroutine(result) else result

        return wrap(target, name, guarded)

    return guarding


class _Call:
    """One call of an instrumented function. ``run`` calls the function, and its outcome is known afterwards."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._outcome: Callable[[], Any] | None = None  # returns or raises what the function did
        self.run = wraps(function)(lambda *args, **kwargs: self._run(*args, **kwargs))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self._function(*args, **kwargs)
        except BaseException as error:
            self._outcome = partial(_raise, error)
            raise
        if inspect.iscoroutine(result):
            return self._wait(result)
        self._outcome = lambda: result
        return result

    async def _wait(self, running: Coroutine[Any, Any, Any]) -> Any:
        try:
            result = await running
        except BaseException as error:
            self._outcome = partial(_raise, error)
            raise
        self._outcome = lambda: result
        return result

    async def awaited(self, traced: Coroutine[Any, Any, Any], args: Any, kwargs: Any) -> Any:
        try:
            return await traced
        except Exception as error:
            result = self.instead_of(error, args, kwargs)
            return await result if inspect.iscoroutine(result) else result

    def instead_of(self, error: Exception, args: Any, kwargs: Any) -> Any:
        """The function's own outcome. If an error came before the call, the call is made."""
        if self._outcome is not None and getattr(self._outcome, "args", ()) == (error,):
            raise error
        logger.warning("a call is not fully traced, its instrumentation failed: %s: %s", type(error).__name__, error)
        return self._function(*args, **kwargs) if self._outcome is None else self._outcome()


def _raise(error: BaseException) -> Any:
    raise error


def _guard_streams() -> None:
    """Keeps a fault in the instrumentation of a stream from the agent that reads it: the instrumentations of all
    frameworks look at each piece before the agent gets it, in these methods of their classes."""
    module = sys.modules.get("opentelemetry.util.genai.stream")
    classes = [] if module is None else [module.SyncStreamWrapper, module.AsyncStreamWrapper]
    for found in classes:
        classes += type.__subclasses__(found)  # also of those that are added here
        for name in ("_process_chunk", "_on_stream_end", "_on_stream_error"):
            method = getattr(found, name)  # often of a class that it inherits besides
            if not getattr(method, "__isabstractmethod__", False) and not hasattr(method, "__wrapped__"):
                setattr(found, name, _guarded(method))


def _guarded(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def guarded(*args: Any) -> None:
        try:
            method(*args)
        except Exception as error:
            logger.warning(
                "a streamed call is not fully traced, its instrumentation failed: %s in %s: %s",
                type(error).__name__,
                method.__qualname__,
                error,
            )

    return guarded
