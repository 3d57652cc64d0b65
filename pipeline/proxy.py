"""The LLM proxy: what an agent asks a model, and the answer token by token, becomes a span before the agent sees it.

    POST /rollout/{id}/attempt/{id}/v1/chat/completions    a call, bound to its attempt by path and key
    POST /rollout/{id}/attempt/{id}/close                  no more calls; answers {"spans": how many there were}

The span is acknowledged by the log before the answer ends, so whoever reads the attempt's terminal event has read every
call. A call that can't be recorded fails: training on a hole would be worse.
"""

import asyncio
import hashlib
import hmac
import json
import struct
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, cast

from aiohttp import web

from millstream.pipeline.backend import Backend, BackendUnavailable, Completion
from millstream.producers.blob_store import BlobError, Blobs
from millstream.producers.port import Producer, send_acknowledged
from millstream.schemas import semconv
from millstream.schemas.errors import LogError, TooLarge
from millstream.schemas.identity import attempt_key
from millstream.schemas.log import KIND_HEADER
from millstream.schemas.records import Span
from millstream.schemas.settings import Settings
from millstream.schemas.topics import Topics

CLOSED_KEPT_S = 3600.0  # how long an attempt's end is remembered; longer than any call of it can still be under way
CACHED_ANSWERS = 10_000  # at most; the oldest go first
RECORD_S = 30.0  # how long a span may take to be acknowledged before its call fails
ATTEMPT = "/rollout/{rollout_id}/attempt/{attempt_id}"


@dataclass(slots=True)
class _Attempt:
    rollout_id: str
    attempt_id: str
    key: bytes
    spans: int = 0
    in_flight: int = 0
    closed: bool = False
    touched: float = 0.0
    drained: asyncio.Event = field(default_factory=asyncio.Event)


class Proxy:
    """An aiohttp application (`app`) in front of one back end."""

    def __init__(
        self,
        producer: Producer,
        topics: Topics,
        backend: Backend,
        secret: str,
        *,
        max_body: int = 16 << 20,
        cache_ttl: float = 0.0,
        blobs: Blobs | None = None,
    ) -> None:
        """``max_body`` is in bytes. For ``cache_ttl`` seconds a request with temperature 0 is answered again without
        the model; such an answer has no token ids in its span, so nobody trains on it. 0 turns that off."""
        self._producer = producer
        self._topics = topics
        self._backend = backend
        self._secret = secret
        self._attempts: OrderedDict[str, _Attempt] = OrderedDict()
        self._blobs = blobs or Blobs()
        self._cache_ttl = cache_ttl
        self._cache: OrderedDict[bytes, tuple[float, Completion]] = OrderedDict()  # oldest first
        self.app = web.Application(client_max_size=max_body, middlewares=[_openai_errors])
        self.app.add_routes(
            [
                web.post(ATTEMPT + "/v1/chat/completions", self._chat),
                web.post(ATTEMPT + "/close", self._close),
                web.get("/livez", _alive),
                web.post("/v1/{rest:.*}", _outside),
            ]
        )

    @classmethod
    def of(cls, settings: Settings, producer: Producer, backend: Backend, secret: str) -> "Proxy":
        """With the limits of a deployment."""
        limit, ttl = settings.max_record_bytes, settings.cache_ttl
        blobs = Blobs(settings.blob_url)
        return cls(producer, settings.topics, backend, secret, max_body=limit, cache_ttl=ttl, blobs=blobs)

    async def _chat(self, request: web.Request) -> web.Response:
        attempt = self._authorised(request)
        asked = await _json_body(request)
        if attempt.closed:
            # 410: a status that no SDK retries.
            raise web.HTTPGone(text=f"attempt {attempt.attempt_id} has ended; it can't call a model any more")
        attempt.in_flight += 1
        attempt.drained.clear()
        start = time.time_ns()
        try:
            completion = await self._complete(asked)
            await self._record(attempt, asked, completion, start, request.headers.get("traceparent", ""))
        finally:
            attempt.in_flight -= 1
            attempt.touched = time.monotonic()
            if not attempt.in_flight:
                attempt.drained.set()
        return web.json_response(_for_client(asked, completion.body), status=completion.status)

    async def _complete(self, asked: dict[str, Any]) -> Completion:
        key: bytes | None = None
        if self._cache_ttl and asked.get("temperature") == 0:
            key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
            if (cached := self._cached(key)) is not None:
                return cached
        try:
            completion = await self._backend.chat({**asked, "return_token_ids": True, "logprobs": True})
        except BackendUnavailable as error:
            return Completion(502, _error(f"the model server doesn't answer: {error}", "api_error"), None)
        if key is not None and completion.status == 200:
            self._cache[key] = (time.monotonic() + self._cache_ttl, completion)
            if len(self._cache) > CACHED_ANSWERS:
                self._cache.popitem(last=False)
        return completion

    def _cached(self, key: bytes) -> Completion | None:
        """An answer given before, as a new one that nothing can be learnt from."""
        expires, completion = self._cache.get(key, (0.0, None))
        if completion is None or expires < time.monotonic():
            return None
        body = _for_client({}, completion.body) | {"id": f"chatcmpl-{token_hex(16)}"}
        return Completion(completion.status, body, completion.model_version)

    async def _record(
        self, attempt: _Attempt, asked: dict[str, Any], completion: Completion, start: int, traceparent: str
    ) -> None:
        """The call as a span, in the log. Raises HTTPServiceUnavailable if the log doesn't take it."""
        attempt.spans += 1
        span = call_span(attempt.rollout_id, attempt.attempt_id, attempt.spans, asked, completion, start, traceparent)
        try:
            span = await self._blobs.keep(span)
            sending = send_acknowledged(
                self._producer,
                self._topics.events,
                span,
                key=attempt.rollout_id,
                headers={KIND_HEADER: semconv.LLM.encode()},
            )
            await asyncio.wait_for(sending, RECORD_S)
        except TooLarge as error:
            raise web.HTTPRequestEntityTooLarge(0, 0, text=f"too_large: {error}") from error
        except (BlobError, LogError, TimeoutError) as error:
            # It stays counted: the attempt must not be trained on with a call missing.
            raise web.HTTPServiceUnavailable(text=f"the call could not be recorded: {error or 'time-out'}") from error

    async def _close(self, request: web.Request) -> web.Response:
        attempt = self._authorised(request)
        attempt.closed = True
        if attempt.in_flight:
            await attempt.drained.wait()
        self._forget_old()
        return web.json_response({"spans": attempt.spans})

    def _authorised(self, request: web.Request) -> _Attempt:
        rollout_id, attempt_id = request.match_info["rollout_id"], request.match_info["attempt_id"]
        attempt = self._attempts.get(attempt_id)
        if attempt is None or attempt.rollout_id != rollout_id:
            key = attempt_key(self._secret, rollout_id, attempt_id).encode()
            attempt = _Attempt(rollout_id, attempt_id, key)
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), attempt.key):
            raise web.HTTPUnauthorized(text=f"the API key is not that of attempt {attempt_id}")
        self._attempts[attempt_id] = attempt
        attempt.touched = time.monotonic()
        self._attempts.move_to_end(attempt_id)
        return attempt

    def _forget_old(self) -> None:
        horizon = time.monotonic() - CLOSED_KEPT_S
        while self._attempts:
            oldest = next(iter(self._attempts.values()))
            if oldest.in_flight or oldest.touched > horizon:
                return
            del self._attempts[oldest.attempt_id]


def call_span(
    rollout_id: str,
    attempt_id: str,
    sequence: int,
    asked: dict[str, Any],
    completion: Completion,
    start: int,
    traceparent: str,
) -> Span:
    """An LLM call as the proxy saw it. Token ids and logprobs are the engine's own; with several choices there is no
    one response, and they are left out."""
    body, ok = completion.body, completion.status == 200
    choices = body.get("choices", []) if ok else []
    choice = choices[0] if len(choices) == 1 else {}
    usage = body.get("usage") or {}
    attributes = {
        semconv.OPERATION: "chat",
        semconv.REQUEST_MODEL: str(asked.get("model", "")),
        semconv.REQUEST_MESSAGES: json.dumps(asked.get("messages", []), ensure_ascii=False),
    }
    if asked.get("tools"):
        attributes[semconv.TOOL_DEFINITIONS] = json.dumps(asked["tools"], ensure_ascii=False)
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        if asked.get(name) is not None:
            attributes[f"gen_ai.request.{name}"] = json.dumps(asked[name])
    if ok:
        attributes |= {
            semconv.RESPONSE_ID: str(body.get("id", "")),
            semconv.RESPONSE_MODEL: str(body.get("model", "")),
            semconv.RESPONSE_MESSAGE: json.dumps(choice.get("message"), ensure_ascii=False),
            semconv.FINISH_REASONS: json.dumps([c.get("finish_reason") for c in choices]),
            semconv.INPUT_TOKENS: str(usage.get("prompt_tokens", 0)),
            semconv.OUTPUT_TOKENS: str(usage.get("completion_tokens", 0)),
        }
    else:
        attributes[semconv.ERROR_TYPE] = str(completion.status)
    trace_id, parent_id = _trace_context(traceparent, attempt_id)
    return Span(
        trace_id=trace_id,
        span_id=token_hex(8),
        parent_id=parent_id,
        name=f"chat {asked.get('model', '')}",
        kind=semconv.LLM,
        span_kind="Client",
        start=start,
        end=time.time_ns(),
        status="Ok" if ok else "Error",
        status_message="" if ok else str((body.get("error") or {}).get("message", completion.status)),
        attributes=attributes,
        resource={"service.name": "millstream-proxy"},
        scope_name="millstream.proxy",
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        source=semconv.SOURCE_PROXY,
        sequence=sequence,
        prompt_token_ids=_int32(body.get("prompt_token_ids")) if choice else None,
        response_token_ids=_int32(choice.get("token_ids")),
        response_logprobs=_logprobs(choice.get("logprobs")),
        model_version=completion.model_version,
    )


def _trace_context(traceparent: str, attempt_id: str) -> tuple[str, str]:
    """Trace id and parent id of a W3C traceparent; without one, a trace of the attempt's own."""
    parts = traceparent.split("-")
    if len(parts) == 4 and len(parts[1]) == 32 and len(parts[2]) == 16:
        return parts[1], parts[2]
    return attempt_id.replace("-", ""), ""


def _int32(ids: list[int] | None) -> bytes | None:
    return None if ids is None else struct.pack(f"<{len(ids)}i", *ids)


def _logprobs(logprobs: dict[str, Any] | None) -> bytes | None:
    content = (logprobs or {}).get("content")
    if content is None:
        return None
    return struct.pack(f"<{len(content)}f", *[token["logprob"] for token in content])


def _for_client(asked: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """The answer as if only what the client asked for had been asked for."""
    if "choices" not in body:
        return body
    keep_ids, keep_logprobs = bool(asked.get("return_token_ids")), bool(asked.get("logprobs"))
    hidden = set() if keep_ids else {"prompt_token_ids", "token_ids"}
    choices = [
        {k: (v if k != "logprobs" or keep_logprobs else None) for k, v in choice.items() if k not in hidden}
        for choice in body["choices"]
    ]
    return {k: v for k, v in body.items() if k not in hidden} | {"choices": choices}


async def _json_body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="the body is not a JSON object")
    if body.get("stream"):
        raise web.HTTPBadRequest(text="stream: true is not supported here; ask without it")
    return body


async def _alive(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _outside(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(
        text=f"{request.path} names no attempt: call the model within a rollout, or use the base URL of your attempt, "
        "/rollout/{rollout_id}/attempt/{attempt_id}/v1"
    )


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": None, "param": None}}


@web.middleware
async def _openai_errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Errors in the form that OpenAI's SDK understands."""
    try:
        return cast("web.StreamResponse", await handler(request))
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kind = "invalid_request_error" if error.status < 500 else "api_error"
        return web.json_response(_error(error.text or error.reason, kind), status=error.status)
