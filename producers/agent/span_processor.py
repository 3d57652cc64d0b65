"""Converts OpenTelemetry spans to `Span` records, one by one as they end.

OpenTelemetry's BatchSpanProcessor drops spans under load, and its ``force_flush`` does not report it. Here the attempt
has a span when the call that ended it returns.
"""

from collections.abc import Mapping
from functools import lru_cache

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.trace import SpanKind
from opentelemetry.trace.status import StatusCode

from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.producers.agent.shared_threads import note_call
from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import kind_of, rewards_of
from millstream.schemas.spans.text import texts, utf8
from millstream.schemas.wire.records import Span, SpanEvent, SpanLink

MAX_OPEN = 100_000  # spans not yet ended; above it the oldest are forgotten, which bounds a leak

_SPAN_KIND = {kind: kind.name.capitalize() for kind in SpanKind}
_STATUS = {StatusCode.UNSET: "Unset", StatusCode.OK: "Ok", StatusCode.ERROR: "Error"}


@lru_cache(maxsize=1 << 10)
def _trace_id(trace_id: int) -> str:
    return f"{trace_id:032x}"


@lru_cache(maxsize=1 << 10)
def _parent_id(span_id: int) -> str:
    return f"{span_id:016x}"


class AttemptSpanProcessor(SpanProcessor):
    """Emits each span to the attempt in whose context it started, wherever it ends. Ignores spans outside attempts."""

    def __init__(self) -> None:
        self._open: dict[int, AttemptContext] = {}  # by span id
        self._resource: tuple[object, dict[str, str]] = (None, {})  # the last one seen; it rarely changes

    def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
        attempt = current_attempt(parent_context) or current_attempt()
        if attempt is None:
            return
        note_call(attempt, parent_context)
        if len(self._open) >= MAX_OPEN:
            self._open.pop(next(iter(self._open)), None)
        self._open[span.get_span_context().span_id] = attempt

    def on_end(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        attempt = self._open.pop(context.span_id, None) if context is not None else None
        if attempt is None:
            return
        source, resource = self._resource
        if source is not span.resource:
            resource = texts(span.resource.attributes)
            self._resource = (span.resource, resource)
        attempt.emit(to_record(span, attempt, resource))

    def shutdown(self) -> None:
        """Does nothing: providers share this processor, and an agent may shut its own down."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True  # nothing is buffered


def to_record(span: ReadableSpan, attempt: AttemptContext, resource: Mapping[str, str]) -> Span:
    """Converts a finished span to the attempt's next record."""
    context = span.get_span_context()
    assert context is not None
    attributes = texts(span.attributes)
    kind = kind_of(attributes)
    reward = reward_name = None
    if kind == semconv.REWARD and (rewards := rewards_of(attributes)):
        reward_name, reward = rewards[0]
        attempt.rewarded = True
    parent, status, scope = span.parent, span.status, span.instrumentation_scope
    if parent is not None and not parent.trace_flags.sampled:  # of a provider that does not record it: below the root
        parent = trace.get_current_span(attempt.context).get_span_context()
    # Usually empty, and the properties copy them twice under a lock. Without the private fields, reads the properties.
    events = span.events if getattr(span, "_events", True) else ()
    links = span.links if getattr(span, "_links", True) else ()
    return Span(
        trace_id=_trace_id(context.trace_id),
        span_id=f"{context.span_id:016x}",
        parent_id=_parent_id(parent.span_id) if parent is not None else "",
        trace_state=context.trace_state.to_header() if context.trace_state else "",
        name=utf8(span.name),
        kind=kind,
        span_kind=_SPAN_KIND[span.kind],
        start=span.start_time or 0,
        end=span.end_time or 0,
        status=_STATUS[status.status_code],
        status_message=utf8(status.description or ""),
        attributes=attributes,
        events=tuple([SpanEvent(name=e.name, time=e.timestamp, attributes=texts(e.attributes)) for e in events])
        if events
        else (),
        links=tuple(
            [
                SpanLink(
                    trace_id=f"{link.context.trace_id:032x}",
                    span_id=f"{link.context.span_id:016x}",
                    attributes=texts(link.attributes),
                )
                for link in links
            ]
        )
        if links
        else (),
        resource=resource,
        scope_name=scope.name if scope is not None else "",
        scope_version=(scope.version or "") if scope is not None else "",
        rollout_id=attempt.task.rollout_id,
        attempt_id=attempt.attempt_id,
        source=semconv.SOURCE_AGENT,
        sequence=next(attempt.sequence),
        reward=reward,
        reward_name=reward_name,
    )
