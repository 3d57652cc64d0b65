"""Traces a process that runs attempts, with its own TracerProvider and one root span per attempt."""

import concurrent.futures.thread  # noqa: F401 - see `_provider`
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final
from weakref import WeakSet

import wrapt
from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from millstream.producers.agent import shared_threads
from millstream.producers.agent.attempt import AttemptContext, enter, leave
from millstream.producers.agent.client_binding import bind_clients
from millstream.producers.agent.instrumentation import FRAMEWORKS
from millstream.producers.agent.instrumentation import instrument as instrument_frameworks
from millstream.producers.agent.printed_streams import keep_printed
from millstream.producers.agent.span_processor import AttemptSpanProcessor
from millstream.schemas.spans import semconv

logger = logging.getLogger(__name__)

_CAPTURE: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_DISABLED: Final = "OTEL_SDK_DISABLED"

# Frameworks read these at import. Values that are already set take precedence.
SWITCHES = {
    _CAPTURE: "SPAN_ONLY",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "100000",  # at 128, long conversations lose their oldest messages
    "ANTHROPIC_OPEN_TELEMETRY": "false",  # these two have their own tracing, which duplicates spans
    "AUTOGEN_DISABLE_RUNTIME_TRACING": "true",
    # CrewAI sends usage data to its vendor, may prompt for consent to send more, and checks for updates.
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
}
PLACEHOLDER_KEY = "millstream"  # the SDKs require a key; each request gets its attempt's


class ProcessTracer:
    """Runs attempts below a root span. Create it before the agent is imported; call `adopt_global_provider` after."""

    def __init__(
        self, agent_name: str, proxy_urls: Sequence[str] = (), instrument: Iterable[str] = tuple(FRAMEWORKS)
    ) -> None:
        """Sets up environment variables, HTTP clients and instrumentation. ``instrument``: names of `FRAMEWORKS`."""
        self.agent_name = agent_name
        _correct_environment()
        for name, value in SWITCHES.items():
            os.environ.setdefault(name, value)
        if proxy_urls:
            os.environ["OPENAI_BASE_URL"] = f"{proxy_urls[0]}/v1"
            os.environ["OPENAI_API_KEY"] = PLACEHOLDER_KEY
            os.environ["ANTHROPIC_BASE_URL"] = proxy_urls[0]
            os.environ["ANTHROPIC_API_KEY"] = PLACEHOLDER_KEY
        for proxy_url in proxy_urls:
            bind_clients(proxy_url)
        self._tracer = _provider().get_tracer("millstream")
        self._root_name = f"invoke_agent {agent_name}"
        self._root_attributes = {semconv.OPERATION: "invoke_agent", semconv.AGENT_NAME: agent_name}
        instrument_frameworks(_provider(), instrument)

    @contextmanager
    def attempt(self, attempt: AttemptContext) -> Iterator[None]:
        """Runs the body as part of the attempt, below its root span, which records the outcome.

        Raises `SharedWorker`.
        """
        keep_printed()
        attempt.tracer = self._tracer
        token = enter(attempt)
        shared_threads.began(attempt)
        try:
            with self._tracer.start_as_current_span(self._root_name, attributes=self._root_attributes) as root:
                attempt.context = otel.get_current()
                try:
                    yield
                    shared_threads.refuse_shared(attempt)
                finally:
                    attempt.printed.end(root)
        finally:
            shared_threads.ended(attempt)
            leave(token)


def adopt_global_provider() -> None:
    """Records the spans that the agent's code creates with OpenTelemetry's global tracer provider: the one that the
    agent has set, which keeps its exporters, or ours."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):
        trace.set_tracer_provider(_provider())
    elif not isinstance(provider, TracerProvider):
        logger.warning(
            "the agent's global tracer provider (%s) is not OpenTelemetry's SDK: its spans are not recorded",
            type(provider).__name__,
        )
    else:
        _listen(provider)


def _correct_environment() -> None:
    """Replaces a value that frameworks take for its opposite."""
    given = os.environ.get(_CAPTURE, "").strip().lower()
    if given in ("true", "1", "yes", "on", "all"):
        logger.warning("%s=%s means no content to the instrumentations; it is set to SPAN_ONLY", _CAPTURE, given)
        os.environ[_CAPTURE] = SWITCHES[_CAPTURE]


# One per process: the processor finds a span's attempt in the span's context.
_processor = AttemptSpanProcessor()
_tapped: WeakSet[TracerProvider] = WeakSet()
_LIMITS: Final = (
    "max_attributes",
    "max_events",
    "max_links",
    "max_span_attributes",
    "max_event_attributes",
    "max_link_attributes",
    "max_attribute_length",
    "max_span_attribute_length",
)


@cache
def _provider() -> TracerProvider:
    """Created at first use, when the switches are set.

    OpenTelemetry's after-fork handler uses an executor, whose module holds its lock during the fork. Handlers run in
    the order of their registration. So that module must be imported first, or the forked process hangs.

    The environment's limits and sampler are for the agent's own telemetry: here they would cut prompts and drop spans.
    """
    unlimited = SpanLimits(**dict.fromkeys(_LIMITS, SpanLimits.UNSET))
    if (disabled := os.environ.pop(_DISABLED, None)) is not None:
        logger.warning("%s=%s does not hold for attempts: they are traced", _DISABLED, disabled)
    try:
        provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource({"service.name": "millstream-agent"}),
            shutdown_on_exit=False,
            span_limits=unlimited,
        )
    finally:
        if disabled is not None:
            os.environ[_DISABLED] = disabled
    _listen(provider)
    wrapt.wrap_function_wrapper(TracerProvider, "__init__", _tap)
    return provider


def _tap(wrapped: Any, provider: TracerProvider, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Each provider that is created from now on: the agent may make spans with it without setting it globally."""
    wrapped(*args, **kwargs)
    _listen(provider)


def _listen(provider: TracerProvider) -> None:
    if provider not in _tapped:
        provider.add_span_processor(_processor)
        _tapped.add(provider)
