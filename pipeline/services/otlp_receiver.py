"""``POST /v1/traces``: receives spans from agents' own processes, in any language, by OTLP/HTTP 1.x.

The key is checked before the body is read. A request is answered with 200 once the log has stored its spans. Spans that
can't be read, belong to no attempt or to another one than the key, or are too large, are counted in ``partial_success``
with the reason. 503 means: send the request again.
"""

import asyncio
import hmac
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceResponse,
)
from starlette.requests import Request
from starlette.responses import Response

from millstream.pipeline.services.serve_asgi import body_of, for_this_machine
from millstream.producers.blob_store import BlobError, Blobs
from millstream.producers.log.acks import Acks
from millstream.producers.log.port import Producer
from millstream.schemas.attempt_keys import BadKey, check_issued, claims_of
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import CodecError, LogError, TooLarge
from millstream.schemas.spans.otlp import Malformed, Parsed, from_otlp, parse_json, parse_protobuf
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.records import Span

PATH: Final = "/v1/traces"
PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"
PARSERS: Final[dict[str, Callable[[bytes], Parsed]]] = {PROTOBUF: parse_protobuf, JSON: parse_json}


@dataclass(frozen=True)
class OtlpPolicy:
    max_body_bytes: int = 64 << 20  # decompressed; exporters send less
    requests: int = 4  # in memory at a time
    body_s: float = 10.0  # for a body to arrive, since it holds one of those places; exporters wait as long
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
        self.stored = 0  # spans

    async def receive(self, request: Request) -> Response:
        form = request.headers.get("content-type", "").partition(";")[0].strip()
        try:
            if form not in PARSERS:
                raise _Refused(415, f"send Content-Type: {PROTOBUF} or {JSON}, not {form!r}")
            key = self._key_of(request)
            async with self._free:
                body = await self._body(request)
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

    async def _body(self, request: Request) -> bytes:
        limit, seconds = self._policy.max_body_bytes, self._policy.body_s
        late = _Refused(408, f"the body did not arrive within {seconds:g} s")
        return await body_of(request, limit, seconds, _too_large(limit), late)

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
        try:
            check_issued(self._secret, given)
        except BadKey as error:
            raise _Refused(401, str(error)) from error
        return given

    def _read(self, form: str, packed: str, body: bytes, key: str | None) -> tuple[list[Span], list[str]]:
        """The spans, and the reasons why others are rejected."""
        try:
            spans, rejected = from_otlp(*PARSERS[form](_unpacked(body, packed, self._policy.max_body_bytes)))
        except Malformed as error:
            raise _Refused(400, str(error)) from error
        if key is None or not spans:
            return spans, rejected
        wrong = dict(self._wrong(key, {(span.rollout_id, span.attempt_id) for span in spans}))
        allowed = [span for span in spans if (span.rollout_id, span.attempt_id) not in wrong]
        if not allowed:
            raise _Refused(401, next(iter(wrong.values())))
        reasons = (wrong.get((span.rollout_id, span.attempt_id)) for span in spans)
        return allowed, rejected + [reason for reason in reasons if reason is not None]

    def _wrong(self, key: str, attempts: Iterable[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], str]]:
        """Those that the key does not fit, with the reason."""
        for rollout_id, attempt_id in attempts:
            try:
                claims_of(self._secret, rollout_id, attempt_id, key)
            except BadKey as error:
                yield (rollout_id, attempt_id), f"{error} of rollout {rollout_id}"

    async def _store(self, spans: list[Span], rejected: list[str]) -> None:
        """Returns once the log has stored them; adds to ``rejected`` the reasons of those that it can't store."""
        written = Acks(self._producer)
        try:
            spans = [kept for span in spans if (kept := await self._kept(span, rejected)) is not None]
            await asyncio.to_thread(self._send, written, spans, rejected)
            await asyncio.wait_for(written.wait(), self._policy.record_s)
            self.stored += written.sent
        except (BlobError, LogError, TimeoutError) as error:
            raise _Refused(503, f"the spans can't be stored, send them again: {error or 'time-out'}") from error

    async def _kept(self, span: Span, rejected: list[str]) -> Span | None:
        try:
            return await self._blobs.keep(span)
        except BlobError:
            raise
        except Exception as error:  # whatever it is, it costs this span only
            rejected.append(f"span {span.name!r}: {error}")
            return None

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
