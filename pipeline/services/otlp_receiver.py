"""``POST /v1/traces``: receives spans from agents' own processes, in any language, by OTLP/HTTP 1.x.

A request is answered with 200 once the log has stored its spans. Spans that belong to no attempt or are too large are
counted in ``partial_success``, with the reason. 503 means: send the request again.
"""

import asyncio
import hmac
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from starlette.requests import Request
from starlette.responses import Response

from millstream.pipeline.services.serve_asgi import for_this_machine, limited
from millstream.producers.blob_store import BlobError, Blobs
from millstream.producers.log.acks import Acks
from millstream.producers.log.port import Producer
from millstream.schemas.attempt_keys import BadKey, claims_of
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import CodecError, LogError, TooLarge
from millstream.schemas.spans.otlp import Malformed, from_otlp, parse_json, parse_protobuf
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.records import Span

PATH: Final = "/v1/traces"
PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"
PARSERS: Final[dict[str, Callable[[bytes], ExportTraceServiceRequest]]] = {PROTOBUF: parse_protobuf, JSON: parse_json}


@dataclass(frozen=True)
class OtlpPolicy:
    max_body_bytes: int = 64 << 20  # decompressed; exporters send less
    requests: int = 4  # in memory at a time
    record_s: float = 8.0  # for the log to store a request's spans; exporters wait for 10 s
    retry_after_s: int = 2


class _Refused(Exception):
    """The answer to a request that can't be served."""

    def __init__(self, http_status: int, message: str) -> None:
        super().__init__(message)
        self.http_status = http_status


class OtlpReceiver:
    """Accepts spans with the key of their attempt, or with the gateway's token."""

    def __init__(self, producer: Producer, settings: Settings, policy: OtlpPolicy = OtlpPolicy()) -> None:
        self._producer = producer
        self._topics = settings.topics
        self._token = settings.gateway_token.get_secret_value()
        self._secret = settings.proxy_secret.get_secret_value()
        self._blobs = Blobs(settings.blob_url)
        self._policy = policy
        self._free = asyncio.Semaphore(policy.requests)

    async def receive(self, request: Request) -> Response:
        form = request.headers.get("content-type", "").partition(";")[0].strip()
        try:
            if form not in PARSERS:
                raise _Refused(415, f"send Content-Type: {PROTOBUF} or {JSON}, not {form!r}")
            key = self._key_of(request)
            async with self._free:
                limit = self._policy.max_body_bytes
                body = await limited(request, limit, _too_large(limit)).body()
                packed = request.headers.get("content-encoding", "identity")
                spans, rejected = await asyncio.to_thread(self._read, form, packed, body, key)
                await self._store(spans, rejected)
        except _Refused as error:
            answer = _answer(form, Status(message=str(error)), error.http_status)
            if error.http_status == 503:
                answer.headers["Retry-After"] = str(self._policy.retry_after_s)
            return answer
        message = ExportTraceServiceResponse()
        if rejected:
            message.partial_success.rejected_spans = len(rejected)
            message.partial_success.error_message = "; ".join(dict.fromkeys(rejected))[:2000]
        return _answer(form, message)

    def _key_of(self, request: Request) -> str | None:
        """The attempt's key that was sent; None if the sender may send spans of any attempt."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._token and hmac.compare_digest(given.encode(), self._token.encode()):
            return None
        if not given and not self._token:
            if for_this_machine(request):
                return None
            raise _Refused(403, "without a token the gateway answers requests to localhost only")
        if not given:
            raise _Refused(401, "send Authorization: Bearer KEY, with the attempt's key or the gateway_token")
        if not self._secret:
            raise _Refused(401, "this gateway can't check attempt keys: set proxy_secret, as for the runners")
        return given

    def _read(self, form: str, packed: str, body: bytes, key: str | None) -> tuple[list[Span], list[str]]:
        """The spans, and the reasons why others are rejected."""
        try:
            spans, rejected = from_otlp(PARSERS[form](_unpacked(body, packed, self._policy.max_body_bytes)))
        except Malformed as error:
            raise _Refused(400, str(error)) from error
        if key is not None:
            self._check(key, {(span.rollout_id, span.attempt_id) for span in spans})
        return spans, rejected

    def _check(self, key: str, attempts: Iterable[tuple[str, str]]) -> None:
        for rollout_id, attempt_id in attempts:
            try:
                claims_of(self._secret, rollout_id, attempt_id, key)
            except BadKey as error:
                raise _Refused(401, f"{error} of rollout {rollout_id}") from error

    async def _store(self, spans: list[Span], rejected: list[str]) -> None:
        """Returns once the log has stored them; adds to ``rejected`` the reasons of those that it can't store."""
        written = Acks(self._producer)
        try:
            spans = [await self._blobs.keep(span) for span in spans]
            await asyncio.to_thread(self._send, written, spans, rejected)
            await asyncio.wait_for(written.wait(), self._policy.record_s)
        except (BlobError, LogError, TimeoutError) as error:
            raise _Refused(503, f"the spans can't be stored, send them again: {error or 'time-out'}") from error

    def _send(self, written: Acks, spans: list[Span], rejected: list[str]) -> None:
        for span in spans:
            headers = {KIND_HEADER: span.kind.encode()}
            try:
                written.send(self._topics.events, codec.encode(span), key=span.rollout_id, headers=headers)
            except (CodecError, TooLarge) as error:
                rejected.append(f"span {span.name!r}: {error}")


def _unpacked(body: bytes, packed: str, limit: int) -> bytes:
    if packed == "identity":
        return body
    if packed not in ("gzip", "deflate"):
        raise _Refused(415, f"send Content-Encoding: gzip, deflate or none, not {packed!r}")
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # detects which of the two it is
    try:
        plain = unpacking.decompress(body, limit + 1)
    except zlib.error as error:
        raise Malformed(f"the body is not {packed}: {error}") from error
    if len(plain) > limit:
        raise _too_large(limit)
    if not unpacking.eof or unpacking.unused_data:
        raise Malformed(f"the body is not one complete {packed} stream")
    return plain


def _too_large(limit: int) -> _Refused:
    return _Refused(413, f"the body has more than {limit:,} bytes; export fewer spans at once")


def _answer(form: str, message: Message, http_status: int = 200) -> Response:
    """In the request's content type; JSON if that is unknown."""
    headers = {"WWW-Authenticate": "Bearer"} if http_status == 401 else {}
    if form == PROTOBUF:
        return Response(message.SerializeToString(), http_status, headers, PROTOBUF)
    return Response(json.dumps(json_format.MessageToDict(message)), http_status, headers, JSON)
