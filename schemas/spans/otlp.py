"""`Span` records from OpenTelemetry's own export format: OTLP, opentelemetry-proto 1.x, as protobuf or JSON.

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
from opentelemetry.proto.trace.v1 import trace_pb2

from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import kind_of, rewards_of
from millstream.schemas.spans.text import as_text
from millstream.schemas.wire.records import Span, SpanEvent, SpanLink

SPAN_KINDS = ("Internal", "Internal", "Server", "Client", "Producer", "Consumer")  # by number; 0 is unspecified
STATUSES = ("Unset", "Ok", "Error")


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


def _hex_to_base64(holder: dict[str, Any]) -> None:
    for name in ("traceId", "spanId", "parentSpanId"):
        if name in holder:
            holder[name] = base64.b64encode(bytes.fromhex(holder[name])).decode()
