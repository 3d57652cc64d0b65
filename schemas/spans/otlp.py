"""`Span` records from OpenTelemetry's own export format and back: OTLP, opentelemetry-proto 1.x, as protobuf or JSON.

A received span belongs to the attempt that its attributes, or its resource's, name: `semconv.ROLLOUT_ID` and
`semconv.ATTEMPT_ID`. An exporter may send a span twice; both become the same record.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import kind_of, rewards_of
from millstream.schemas.spans.text import as_text
from millstream.schemas.wire.records import Span, SpanEvent, SpanLink

SPAN_KINDS = ("Internal", "Internal", "Server", "Client", "Producer", "Consumer")  # by number; 0 is unspecified
STATUSES = ("Unset", "Ok", "Error")
# Records hold texts. These attributes get their types back, which tracing back ends expect.
NOT_TEXT = {
    semconv.INPUT_TOKENS,
    semconv.OUTPUT_TOKENS,
    semconv.FINISH_REASONS,
    semconv.EVALUATION_SCORE,
    semconv.AGL_REWARD_VALUE,
    "gen_ai.request.temperature",
    "gen_ai.request.top_p",
    "gen_ai.request.max_tokens",
    "gen_ai.request.seed",
}


class Malformed(ValueError):
    """Not an ExportTraceServiceRequest."""


def parse_protobuf(body: bytes) -> ExportTraceServiceRequest:
    """Raises `Malformed`."""
    try:
        request: ExportTraceServiceRequest = ExportTraceServiceRequest.FromString(body)
    except DecodeError as error:
        raise Malformed(f"the body is not an ExportTraceServiceRequest: {error}") from error
    return request


def parse_json(body: bytes) -> ExportTraceServiceRequest:
    """OTLP's JSON is protobuf's, except for ids in hex. Raises `Malformed`."""
    try:
        document = json.loads(body)
        for spans in document.get("resourceSpans", ()):
            for scope in spans.get("scopeSpans", ()):
                for span in scope.get("spans", ()):
                    for holder in (span, *span.get("links", ())):
                        _hex_to_base64(holder)
        request = json_format.ParseDict(document, ExportTraceServiceRequest(), ignore_unknown_fields=True)
    except (json_format.Error, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(f"the body is not an ExportTraceServiceRequest in JSON: {error}") from error
    assert isinstance(request, ExportTraceServiceRequest)
    return request


def from_otlp(request: ExportTraceServiceRequest) -> tuple[list[Span], list[str]]:
    """The spans as records, in order, and a reason for each span that was refused."""
    records, refused = [], []
    for resource_spans in request.resource_spans:
        resource = _texts(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                try:
                    records.append(_record(span, resource, scope_spans.scope))
                except ValueError as error:
                    refused.append(f"span {span.name!r}: {error}")
    return records, refused


def to_otlp(spans: Iterable[Span]) -> ExportTraceServiceRequest:
    """One request with all spans, in order; rollout and attempt become attributes, token ids are left out.
    Raises ValueError if an id is not hexadecimal."""
    request = ExportTraceServiceRequest()
    last: tuple[Any, ...] = ()
    for span in spans:
        if (source := (span.resource, span.scope_name, span.scope_version)) != last:
            last = source
            resource = Resource(attributes=_attributes(span.resource))
            scope = InstrumentationScope(name=span.scope_name, version=span.scope_version)
            into = request.resource_spans.add(resource=resource).scope_spans.add(scope=scope).spans
        into.append(_otlp_span(span))
    return request


def _record(span: trace_pb2.Span, resource: Mapping[str, str], scope: InstrumentationScope) -> Span:
    attributes = _texts(span.attributes)
    rollout_id, attempt_id = (
        attributes.get(name) or resource.get(name, "") for name in (semconv.ROLLOUT_ID, semconv.ATTEMPT_ID)
    )
    if not rollout_id or not attempt_id:
        raise ValueError(
            f"neither it nor its resource has {semconv.ROLLOUT_ID} and {semconv.ATTEMPT_ID}; "
            "ms.attempt_environment() sets them in OTEL_RESOURCE_ATTRIBUTES"
        )
    if len(span.trace_id) != 16 or len(span.span_id) != 8:
        raise ValueError("its trace id has to be 16 bytes and its span id 8")
    kind = kind_of(attributes)
    rewards = rewards_of(attributes) if kind == semconv.REWARD else []
    reward_name, reward = rewards[0] if rewards else (None, None)
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        trace_state=span.trace_state,
        name=span.name,
        kind=kind,
        span_kind=SPAN_KINDS[span.kind] if span.kind < len(SPAN_KINDS) else SPAN_KINDS[0],
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        status=STATUSES[span.status.code] if span.status.code < len(STATUSES) else STATUSES[0],
        status_message=span.status.message,
        attributes=attributes,
        events=tuple(
            SpanEvent(name=e.name, time=e.time_unix_nano, attributes=_texts(e.attributes)) for e in span.events
        ),
        links=tuple(
            SpanLink(trace_id=link.trace_id.hex(), span_id=link.span_id.hex(), attributes=_texts(link.attributes))
            for link in span.links
        ),
        resource=resource,
        scope_name=scope.name,
        scope_version=scope.version,
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        source=semconv.SOURCE_OTLP,
        sequence=span.start_time_unix_nano,  # no counter: it has to be the same whenever the span is sent
        reward=reward,
        reward_name=reward_name,
    )


def _otlp_span(span: Span) -> trace_pb2.Span:
    ours = {
        semconv.ROLLOUT_ID: span.rollout_id,
        semconv.ATTEMPT_ID: span.attempt_id,
        semconv.MODEL_VERSION: span.model_version,
    }
    return trace_pb2.Span(
        trace_id=bytes.fromhex(span.trace_id),
        span_id=bytes.fromhex(span.span_id),
        parent_span_id=bytes.fromhex(span.parent_id),
        trace_state=span.trace_state,
        name=span.name,
        kind=SPAN_KINDS.index(span.span_kind, 1),  # type: ignore[arg-type] # an enum's number
        start_time_unix_nano=span.start,
        end_time_unix_nano=span.end,
        attributes=_attributes({**span.attributes, **{name: value for name, value in ours.items() if value}}),
        events=[
            trace_pb2.Span.Event(name=e.name, time_unix_nano=e.time, attributes=_attributes(e.attributes))
            for e in span.events
        ],
        links=[
            trace_pb2.Span.Link(
                trace_id=bytes.fromhex(link.trace_id),
                span_id=bytes.fromhex(link.span_id),
                attributes=_attributes(link.attributes),
            )
            for link in span.links
        ],
        status=trace_pb2.Status(
            code=STATUSES.index(span.status),  # type: ignore[arg-type]
            message=span.status_message,
        ),
    )


def _texts(attributes: Iterable[KeyValue]) -> dict[str, str]:
    return {pair.key: as_text(_value(pair.value)) for pair in attributes}


def _value(any_value: AnyValue) -> Any:
    match which := any_value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return [_value(value) for value in any_value.array_value.values]
        case "kvlist_value":
            return {pair.key: _value(pair.value) for pair in any_value.kvlist_value.values}
        case _:
            return getattr(any_value, which)


def _attributes(texts: Mapping[str, str]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any_value(_typed(key, text))) for key, text in texts.items()]


def _typed(key: str, text: str) -> Any:
    if key in NOT_TEXT:
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text


def _any_value(value: Any) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, list):
        made = AnyValue()
        made.array_value.values.extend(_any_value(item) for item in value)
        return made
    return AnyValue(string_value=as_text(value))


def _hex_to_base64(holder: dict[str, Any]) -> None:
    for name in ("traceId", "spanId", "parentSpanId"):
        if name in holder:
            holder[name] = base64.b64encode(bytes.fromhex(holder[name])).decode()
