"""`Span` records from OpenTelemetry's own export format: OTLP, opentelemetry-proto 1.x, as protobuf or JSON.

A received span belongs to the attempt that its attributes, or its resource's, name: `semconv.ROLLOUT_ID` and
`semconv.ATTEMPT_ID`. An exporter may send a span twice; both become the same record.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
WIRE_VARINT, WIRE_BYTES = 0, 2  # protobuf's types of fields


class Malformed(ValueError):
    """Not an ExportTraceServiceRequest."""


Parsed = tuple[ExportTraceServiceRequest, list[str]]  # with a reason for each span that is left out


def parse_protobuf(body: bytes) -> Parsed:
    """Leaves out spans that can't be read, such as those with a text that was cut within a character. Raises
    `Malformed`."""
    refused: list[str] = []
    try:
        try:
            return ExportTraceServiceRequest.FromString(body), refused
        except DecodeError:
            return ExportTraceServiceRequest.FromString(_readable_spans(body, refused)), refused
    except (DecodeError, LookupError) as error:
        raise Malformed(f"the body is not an ExportTraceServiceRequest: {error}") from error


def parse_json(body: bytes) -> Parsed:
    """OTLP's JSON is protobuf's, except for ids in hex. Leaves out spans that can't be read. Raises `Malformed`."""
    refused: list[str] = []

    def keep(read: Callable[[dict[str, Any]], object]) -> None:
        for spans in document.get("resourceSpans", ()):
            for scope in spans.get("scopeSpans", ()):
                scope["spans"] = [span for span in scope.get("spans", ()) if _readable(span, read, refused)]

    try:
        document = json.loads(body)
        keep(_hex_to_base64)
        request = ExportTraceServiceRequest()
        try:
            json_format.ParseDict(document, request, ignore_unknown_fields=True)
        except _UNREADABLE:
            keep(lambda span: json_format.ParseDict(span, trace_pb2.Span(), ignore_unknown_fields=True))
            request = ExportTraceServiceRequest()
            json_format.ParseDict(document, request, ignore_unknown_fields=True)
    except _UNREADABLE as error:
        raise Malformed(f"the body is not an ExportTraceServiceRequest in JSON: {error}") from error
    return request, refused


_UNREADABLE = (json_format.Error, DecodeError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


def _readable(span: Any, read: Callable[[Any], object], refused: list[str]) -> bool:
    try:
        read(span)
    except _UNREADABLE as error:
        refused.append(f"a span can't be read: {error}")
        return False
    return True


def _readable_spans(message: bytes, refused: list[str], path: Sequence[int] = (1, 2, 2)) -> bytes:
    """The encoded request without the spans that can't be parsed. ``path``: numbers of the fields that lead to spans,
    in ``resource_spans``, ``scope_spans`` and ``spans``. Raises LookupError if the message is not protobuf."""
    kept, at = bytearray(), 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == WIRE_BYTES:
            size, at = _varint(message, at)
            body, at = message[at : at + size], at + size
            if at > len(message):
                raise IndexError("it breaks off")
            if tag >> 3 == path[0]:
                if len(path) > 1:
                    body = _readable_spans(body, refused, path[1:])
                    kept += _to_varint(tag) + _to_varint(len(body)) + body
                    continue
                if not _readable(body, trace_pb2.Span.FromString, refused):
                    continue
        elif wire == WIRE_VARINT:
            _, at = _varint(message, at)
        else:
            at += {1: 8, 5: 4}[wire]
        kept += message[start:at]
    return bytes(kept)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        if shift > 63:
            raise IndexError("a number is longer than 64 bits")
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def from_otlp(request: ExportTraceServiceRequest, refused: Iterable[str] = ()) -> tuple[list[Span], list[str]]:
    """The spans as records, in order, and a reason for each span that was refused, after those in ``refused``."""
    records, reasons = [], list(refused)
    for resource_spans in request.resource_spans:
        resource = _texts(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                try:
                    records.append(_record(span, resource, scope_spans.scope))
                except Exception as error:  # whatever it is, it costs this span only
                    reasons.append(f"span {span.name!r}: {str(error) or type(error).__name__}")
    return records, reasons


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


def _hex_to_base64(span: dict[str, Any]) -> None:
    """Of a span and its links, in place."""
    for holder in (span, *span.get("links", ())):
        for name in ("traceId", "spanId", "parentSpanId"):
            if name in holder:
                holder[name] = base64.b64encode(bytes.fromhex(holder[name])).decode()
