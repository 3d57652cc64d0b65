"""Exports spans to a tracing back end by OTLP/HTTP 1.x: protobuf, gzip. Ignores other records.

2xx means taken. After 429, 5xx and anything that an operator can fix (a wrong token, a wrong address) the batch is
retried for as long as it takes. A span becomes a dead letter only if the back end refuses it alone, and takes an empty
request. After a crash a span may be sent twice, with the same ids.
"""

import gzip
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import urllib3
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from millstream.consumers.sink.port import Batch, Unusable
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import CodecError, ConfigError, StoreError
from millstream.schemas.spans.otlp import to_otlp
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.records import Span

logger = logging.getLogger(__name__)

BAD_SPANS = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
PROTOBUF = "application/x-protobuf"

_Pairs = Sequence[tuple[LogRecord, Span]]


@dataclass(frozen=True, slots=True)
class ExportPolicy:
    """How spans are sent."""

    spans: int = 1000  # in a request: collectors take 20 MiB by default; what is larger is halved
    timeout_s: float = 10.0  # OpenTelemetry exporters' own default


class OtlpSink:
    """A `Sink` that exports to ``otlp_endpoint``. ``rejected`` counts the spans that the back end said it dropped."""

    def __init__(
        self,
        settings: Settings,
        policy: ExportPolicy = ExportPolicy(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = settings.otlp_endpoint
        if not self._endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"setting otlp_endpoint: {self._endpoint!r} is not an address like http://collector:4318/v1/traces"
            )
        self._policy = policy
        self._clock = clock
        self._events = settings.topics.events
        self._headers = {name: value.get_secret_value() for name, value in settings.otlp_headers.items()}
        self._headers |= {"Content-Type": PROTOBUF, "Content-Encoding": "gzip"}
        self._http = urllib3.PoolManager(retries=False, timeout=policy.timeout_s)
        self._not_before = 0.0  # the end of the pause that the back end has asked for
        # A batch is retried as a whole: how many of its spans are settled by now, and which of these are unusable.
        self._token = ""
        self._settled = 0
        self._unusable: list[Unusable] = []
        self.rejected = 0

    def write(self, batch: Batch) -> list[Unusable]:
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

    def _spans(self, batch: Batch) -> tuple[list[tuple[LogRecord, Span]], list[Unusable]]:
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
            raise StoreError(f"{self._endpoint} refuses even an empty request, check otlp_endpoint: {empty}")
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
