"""Tracing of other people's packages. What is missing or broken costs its spans and a warning, never the run."""

import logging
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import wrapt
from opentelemetry.instrumentation.threading import ThreadingInstrumentor
from opentelemetry.trace import TracerProvider

logger = logging.getLogger(__name__)

_hooked: set[str] = set()


def instrument(provider: TracerProvider) -> None:
    """Has threads carry the context, and traces each known SDK once the agent imports it. Once in a process: what a
    later call would change is the provider, and the first one's goes on serving every attempt."""
    threads = ThreadingInstrumentor()
    if not threads.is_instrumented_by_opentelemetry:
        threads.instrument()
    if "openai" not in _hooked:
        _hooked.add("openai")
        wrapt.register_post_import_hook(partial(_instrument_openai, provider), "openai")


def _instrument_openai(provider: TracerProvider, module: ModuleType) -> None:
    package = "opentelemetry-instrumentation-genai-openai==1.3b0"
    if find_spec("opentelemetry.instrumentation.genai") is None:
        logger.warning("the agent uses openai, whose calls can't be traced: pip install %s", package)
        return
    try:
        from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor

        OpenAIInstrumentor().instrument(tracer_provider=provider, raise_exception_on_conflict=True)
    except Exception as error:  # whatever a beta release of somebody else's raises
        logger.warning("openai's calls can't be traced (%s: %s): pip install %s", type(error).__name__, error, package)
