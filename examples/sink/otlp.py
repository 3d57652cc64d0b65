"""Exports spans to a tracing back end by OTLP/HTTP 1.x (protobuf, gzip), and ignores other records. Run it with
``millstream sink --sink examples.sink.otlp:OtlpSink``. ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` names the back end, as
http://collector:4318/v1/traces, and ``OTEL_EXPORTER_OTLP_TRACES_HEADERS`` the headers it asks for.

2xx means taken. After 429, 5xx and anything that an operator can fix (a wrong token, a wrong address) the batch is
retried for as long as it takes. A span becomes a dead letter only if the back end refuses it alone, and takes an empty
request. After a crash a span may be sent twice, with the same ids.
"""

import gzip
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import urllib3
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.util.re import parse_env_headers

import millstream as ms
from millstream.consumers.sink.port import Unusable
from millstream.schemas.errors import CodecError, ConfigError, StoreError
from millstream.schemas.spans import semconv
from millstream.schemas.spans.otlp import SPAN_KINDS, STATUSES
from millstream.schemas.spans.text import as_text, parsed
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.records import Span

logger = logging.getLogger(__name__)

ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
HEADERS = "OTEL_EXPORTER_OTLP_TRACES_HEADERS"
BAD_SPANS = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
PROTOBUF = "application/x-protobuf"
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

_Pairs = Sequence[tuple[LogRecord, Span]]


@dataclass(frozen=True, slots=True)
class ExportPolicy:
    """How spans are sent."""

    spans: int = 1000  # in a request: collectors take 20 MiB by default; what is larger is halved
    timeout_s: float = 10.0  # OpenTelemetry exporters' own default


class OtlpSink:
    """A `ms.Sink`. ``rejected`` counts the spans that the back end said it dropped."""

    def __init__(
        self,
        settings: ms.Settings,
        policy: ExportPolicy = ExportPolicy(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = os.environ.get(ENDPOINT, "")
        if not self._endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"{ENDPOINT}: {self._endpoint!r} is not an address like http://collector:4318/v1/traces")
        self._policy = policy
        self._clock = clock
        self._events = settings.topics.events
        self._headers = dict(parse_env_headers(os.environ.get(HEADERS, ""), liberal=True))
        self._headers |= {"Content-Type": PROTOBUF, "Content-Encoding": "gzip"}
        self._http = urllib3.PoolManager(retries=False, timeout=policy.timeout_s)
        self._not_before = 0.0  # the end of the pause that the back end has asked for
        # A batch is retried as a whole: how many of its spans are settled by now, and which of these are unusable.
        self._token = ""
        self._settled = 0
        self._unusable: list[Unusable] = []
        self.rejected = 0

    def write(self, batch: ms.Batch) -> list[Unusable]:
        spans, undecodable = self._spans(batch)
        if batch.token != self._token:
            self._token, self._settled, self._unusable = batch.token, 0, []
        while self._settled < len(spans):
            part = spans[self._settled : self._settled + self._policy.spans]
            self._unusable += self._export(part)
            self._settled += len(part)
        return undecodable + self._unusable

    def flush(self) -> None:
        """What has been written has been taken."""

    def close(self) -> None:
        self._http.clear()

    def _spans(self, batch: ms.Batch) -> tuple[list[tuple[LogRecord, Span]], list[Unusable]]:
        spans, undecodable = [], []
        for record in batch.records:
            if record.partition.topic != self._events:
                continue
            try:
                if codec.type_of(record.value) is Span:
                    spans.append((record, codec.decode_as(Span, record.value)))
            except CodecError as error:
                undecodable.append(Unusable(record, "undecodable", str(error)))
        return spans, undecodable

    def _export(self, pairs: _Pairs) -> list[Unusable]:
        """Sends the spans, and in halves if some are refused; returns those that the back end can't take."""
        try:
            refusal = self._post([span for _, span in pairs])
        except ValueError as error:
            refusal = str(error)
        if refusal is None:
            return []
        if len(pairs) > 1:
            half = len(pairs) // 2
            return self._export(pairs[:half]) + self._export(pairs[half:])
        if (empty := self._post([])) is not None:
            raise StoreError(f"{self._endpoint} refuses even an empty request, check {ENDPOINT}: {empty}")
        return [Unusable(pairs[0][0], "unstorable", refusal)]

    def _post(self, spans: Sequence[Span]) -> str | None:
        """Why the back end refuses the spans; None if it took them. Raises ValueError if they can't be written as OTLP,
        `StoreError` if a retry may help."""
        wait_s = self._not_before - self._clock()
        if wait_s > 0:
            raise StoreError(f"{self._endpoint} has asked for a pause; {wait_s:.0f} s of it are left")
        body = gzip.compress(to_otlp(spans).SerializeToString(), 3)
        try:
            answer = self._http.request("POST", self._endpoint, body=body, headers=self._headers, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise StoreError(f"{self._endpoint} can't be reached: {error}") from error
        if answer.status // 100 == 2:
            self._note_rejected(answer)
            return None
        message = f"{self._endpoint} answered {answer.status} {answer.data[:200].decode('utf-8', 'replace')}"
        if answer.status in BAD_SPANS:
            return message
        pause = answer.headers.get("Retry-After", "")
        self._not_before = self._clock() + (int(pause) if pause.isdecimal() else 0)
        raise StoreError(message)

    def _note_rejected(self, answer: urllib3.BaseHTTPResponse) -> None:
        """Counts spans that the back end has dropped for good, without saying which."""
        if answer.headers.get("Content-Type") != PROTOBUF:
            return
        try:
            partial = ExportTraceServiceResponse.FromString(answer.data).partial_success
        except DecodeError:
            return
        if partial.rejected_spans:
            self.rejected += partial.rejected_spans
            logger.error("%s dropped %d spans: %s", self._endpoint, partial.rejected_spans, partial.error_message)


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


def _attributes(texts: Mapping[str, str]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any_value(_typed(key, text))) for key, text in texts.items()]


def _typed(key: str, text: str) -> Any:
    if key in NOT_TEXT:
        try:
            return parsed(text)
        except ValueError:
            pass
    return text


def _any_value(value: Any) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, list):
        made = AnyValue()
        made.array_value.values.extend(_any_value(item) for item in value)
        return made
    return AnyValue(string_value=as_text(value))
