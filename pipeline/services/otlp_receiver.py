"""``POST /v1/traces``: the spans of agents that are processes of their own, in whatever language, by OTLP/HTTP 1.x.

A request is answered with 200 when the log has all of its spans. One that belongs to no attempt, or is too large, is
counted in ``partial_success``, with the reason. 503 means: send it again.
"""

import asyncio
import hmac
import json
import zlib
from collections.abc import Callable, Iterable
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
from millstream.producers.log.acknowledgements import Acknowledgements
from millstream.producers.log.port import Producer
from millstream.schemas.attempt_keys import BadKey, claims_of
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import CodecError, LogError, TooLarge
from millstream.schemas.spans.otlp import Malformed, from_otlp, parse_json, parse_protobuf
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.records import Span

PATH: Final = "/v1/traces"
MAX_BODY: Final = 64 << 20  # bytes, unpacked: what exporters send at most
AT_ONCE: Final = 4  # requests that are held in memory
RECORD_S: Final = 8.0  # for the log to take a request's spans; exporters wait for 10
RETRY_AFTER_S: Final = 2
PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"
PARSERS: Final[dict[str, Callable[[bytes], ExportTraceServiceRequest]]] = {PROTOBUF: parse_protobuf, JSON: parse_json}


class _Refused(Exception):
    """The answer to a request that can't be served."""

    def __init__(self, http_status: int, message: str) -> None:
        super().__init__(message)
        self.http_status = http_status


class OtlpReceiver:
    """Takes what is authorised by the key of the attempt it belongs to, or by the gateway's token."""

    def __init__(self, producer: Producer, settings: Settings) -> None:
        self._producer = producer
        self._topics = settings.topics
        self._token = settings.gateway_token.get_secret_value()
        self._secret = settings.proxy_secret.get_secret_value()
        self._blobs = Blobs(settings.blob_url)
        self._room = asyncio.Semaphore(AT_ONCE)

    async def receive(self, request: Request) -> Response:
        """The endpoint."""
        form = request.headers.get("content-type", "").partition(";")[0].strip()
        try:
            if form not in PARSERS:
                raise _Refused(415, f"send Content-Type: {PROTOBUF} or {JSON}, not {form!r}")
            key = self._key_of(request)
            async with self._room:
                body = await limited(request, MAX_BODY, _too_large()).body()
                packed = request.headers.get("content-encoding", "identity")
                spans, rejected = await asyncio.to_thread(self._read, form, packed, body, key)
                await self._store(spans, rejected)
        except _Refused as error:
            return _answer(form, Status(message=str(error)), error.http_status)
        answer = ExportTraceServiceResponse()
        if rejected:
            answer.partial_success.rejected_spans = len(rejected)
            answer.partial_success.error_message = "; ".join(dict.fromkeys(rejected))[:2000]
        return _answer(form, answer)

    def _key_of(self, request: Request) -> str | None:
        """The attempt's key that was sent; None if every attempt's spans are welcome."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._token and hmac.compare_digest(given.encode(), self._token.encode()):
            return None
        if not given and not self._token:  # as for all else: whoever is on this machine is trusted
            if for_this_machine(request):
                return None
            raise _Refused(403, "without a token the gateway answers requests to localhost only")
        if not given:
            raise _Refused(401, "send Authorization: Bearer KEY, with the attempt's key or the gateway_token")
        if not self._secret:
            raise _Refused(401, "this gateway can't check an attempt's key: give it proxy_secret, as the runners have")
        return given

    def _read(self, form: str, packed: str, body: bytes, key: str | None) -> tuple[list[Span], list[str]]:
        """The spans, and why others are rejected."""
        try:
            spans, rejected = from_otlp(PARSERS[form](_unpacked(body, packed)))
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
        """Returns when the log has them; adds to ``rejected`` what it will never take."""
        written = Acknowledgements(self._producer)
        try:
            spans = [await self._blobs.keep(span) for span in spans]
            await asyncio.to_thread(self._send, written, spans, rejected)
            await asyncio.wait_for(written.wait(), RECORD_S)
        except (BlobError, LogError, TimeoutError) as error:
            raise _Refused(503, f"the spans can't be written, send them again: {error or 'time-out'}") from error

    def _send(self, written: Acknowledgements, spans: list[Span], rejected: list[str]) -> None:
        for span in spans:
            headers = {KIND_HEADER: span.kind.encode()}
            try:
                written.send(self._topics.events, codec.encode(span), key=span.rollout_id, headers=headers)
            except (CodecError, TooLarge) as error:
                rejected.append(f"span {span.name!r}: {error}")


def _unpacked(body: bytes, packed: str) -> bytes:
    if packed == "identity":
        return body
    if packed not in ("gzip", "deflate"):
        raise _Refused(415, f"send Content-Encoding: gzip, deflate or none, not {packed!r}")
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # sees itself which of the two it is
    try:
        plain = unpacking.decompress(body, MAX_BODY + 1)
    except zlib.error as error:
        raise Malformed(f"the body is not {packed}: {error}") from error
    if len(plain) > MAX_BODY:
        raise _too_large()
    if not unpacking.eof or unpacking.unused_data:
        raise Malformed(f"the body is not one whole {packed} stream")
    return plain


def _too_large() -> _Refused:
    return _Refused(413, f"the body has more than {MAX_BODY:,} bytes; export fewer spans at once")


def _answer(form: str, message: Message, http_status: int = 200) -> Response:
    """In the form of the request; JSON if that is neither."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if http_status == 503 else {}
    if http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if form == PROTOBUF:
        return Response(message.SerializeToString(), http_status, headers, PROTOBUF)
    return Response(json.dumps(json_format.MessageToDict(message)), http_status, headers, JSON)
