"""The life of a model call: asked of a replica, forwarded as it comes, recorded, and only then ended.

Until something of the answer has been sent to the client, a call that fails is made again and nobody notices; after
that, another replica of a policy says the rest, where it can. The end of a stream is held back until the log has
acknowledged the call's span; a whole answer is, too. A call that can't be recorded fails: training on a hole would be
worse.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Final

import orjson
from aiohttp import web

from millstream.pipeline.protocols import sse
from millstream.pipeline.protocols.answers import UPSTREAM_ENDED, Answer, ChatReader, Json, Reader, error_text
from millstream.pipeline.protocols.completion import MODEL_VERSION
from millstream.pipeline.protocols.endpoints import COMPLETIONS, MALFORMED, Endpoint, Plan, Writer, plan
from millstream.pipeline.protocols.openai import BadRequest, chunks_of
from millstream.pipeline.proxy.attempts import ProxiedAttempt
from millstream.pipeline.proxy.http_client import Exchange
from millstream.pipeline.proxy.limits import Busy, all_of
from millstream.pipeline.proxy.migration import Remainder, may_go_on, remainder_of
from millstream.pipeline.proxy.replicas import Failed, Replica, Replicas, Tries
from millstream.pipeline.proxy.spans import CallFacts, call_span, version_of
from millstream.pipeline.proxy.targets import Target, Targets
from millstream.producers.blob_store import BlobError, Blobs
from millstream.producers.log.acknowledged import AcknowledgedSends
from millstream.producers.log.port import Producer
from millstream.schemas.errors import LogError, TooLarge
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)

RECORD_S: Final = 30.0  # how long a span may take to be acknowledged before its call fails
CACHED_ANSWERS: Final = 10_000  # at most; the oldest go first
ANTHROPIC_VERSION: Final = "2023-06-01"
CLIENT_GONE: Final = "the client has gone"
# What is handed on of a client's headers, and of a server's.
_ASKED: Final = ("anthropic-version", "anthropic-beta", "openai-beta")
_TOLD: Final = ("x-request-id", "request-id", "openai-", "anthropic-", "x-ratelimit-", MODEL_VERSION)


class CallError(Exception):
    """What the client is told instead of an answer."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class _ClientGone(Exception):
    """It can't be written to any more."""


@dataclass(slots=True)
class _Call:
    """One call under way."""

    request: web.Request
    attempt: ProxiedAttempt
    endpoint: Endpoint
    target: Target
    plan: Plan
    deadline: float
    facts: CallFacts
    wants_stream: bool
    reader: Reader = field(init=False)
    writer: Writer | None = field(init=False)
    recorded: bool = False
    version: str | None = None
    end_version: str | None = None
    version_before: str | None = None  # of what other replicas have said of it
    remainder: Remainder | None = None  # what the present replica was asked for, if another one had begun
    response: web.StreamResponse | None = None  # once something has been sent
    held: list[bytes] = field(default_factory=list)  # the end of a stream, until the span is stored

    def __post_init__(self) -> None:
        self.again()

    @property
    def answer(self) -> Answer:
        return self.reader.answer

    def again(self) -> None:
        """A try begins, and nothing of the last one counts."""
        self.reader = self.plan.reader()
        self.writer = self.plan.writer() if self.plan.writer is not None else None
        self.version = self.end_version = self.facts.first_token = None
        self.held = []

    def go_on(self, remainder: Remainder) -> None:
        """What there is of a stream counts, and another replica says the remainder."""
        if remainder.made > (self.remainder.made if self.remainder is not None else 0):
            self.version_before = version_of(self.version_before, version_of(self.version, self.end_version))
        self.version = self.end_version = None
        assert isinstance(self.reader, ChatReader)
        self.reader.go_on(remainder.dropped, ended=remainder.request is None)
        self.remainder = remainder

    @property
    def may_go_on(self) -> bool:
        return self.target.replicas.upstream.trainable and may_go_on(self.plan)

    def client_id(self) -> str:
        answer_id = self.answer.id
        return self.writer.client_id(answer_id) if self.writer is not None and answer_id else answer_id


class Calls:
    """Makes and records them."""

    def __init__(
        self, producer: Producer, topics: Topics, targets: Targets, blobs: Blobs, cache_ttl_s: float = 0.0
    ) -> None:
        """For ``cache_ttl_s`` seconds a request of temperature 0 to a model that is nobody's policy is answered again
        without it."""
        self._sends = AcknowledgedSends(producer, RECORD_S)
        self._topics = topics
        self._targets = targets
        self._blobs = blobs
        self._cache_ttl_s = cache_ttl_s
        self._cache: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()  # oldest first
        self._recording: set[asyncio.Task[None]] = set()
        self.recorded = 0
        self.unrecorded = 0

    async def make(
        self, request: web.Request, attempt: ProxiedAttempt, endpoint: Endpoint, asked: Json
    ) -> web.StreamResponse:
        """Answers the client. Raises `CallError` if it has been sent nothing yet and gets no answer."""
        start = time.time_ns()
        try:
            target = self._targets.of(str(asked.get("model") or ""), attempt.rollout_id, attempt.resources_id)
            call = self._planned(request, attempt, endpoint, target, asked, start)
        except BadRequest as error:
            raise CallError(400, str(error)) from error
        limiters = [*([attempt.limiter] if attempt.limiter is not None else []), *target.limiters]
        attempt.enter()
        try:
            if not limiters:
                return await self._made(call)
            async with all_of(limiters, call.deadline):
                try:
                    return await self._made(call)
                finally:
                    tokens = (call.answer.prompt_tokens or 0) + (call.answer.completion_tokens or 0)
                    for limiter in limiters:
                        limiter.used(tokens)
        except Busy as error:
            raise CallError(429, str(error), {"Retry-After": str(math.ceil(error.retry_after_s))}) from error
        except (asyncio.CancelledError, _ClientGone) as error:
            if not call.recorded:
                call.answer.error = CLIENT_GONE
                call.answer.finish_reasons = ["abort"]
                attempt.enter()
                self._in_background(self._recorded_late(call))
            if isinstance(error, _ClientGone) and call.response is not None:
                return call.response
            raise
        except CallError:
            raise
        except Exception as error:  # a fault of ours: the attempt must not be trained on as if the call had not been
            logger.exception("a call of attempt %s failed", attempt.attempt_id)
            call.answer.error = f"the proxy failed: {error!r}"
            if not call.recorded:
                await self._record(call, quietly=True)
            if call.response is not None:
                return await self._broken(call, call.answer.error)
            raise CallError(500, call.answer.error) from error
        finally:
            attempt.leave()

    async def ask(self, target: Target, path: str, asked: Json, request: web.Request) -> tuple[int, Json]:
        """Something that is no model call, and is not recorded. Raises `CallError`."""
        replicas = target.replicas
        deadline = time.monotonic() + replicas.upstream.timeout_s
        headers = self._headers(request, replicas)
        tries = replicas.tries("", deadline)
        while (replica := await tries.next()) is not None:
            try:
                async with replicas.post(replica, path, orjson.dumps(asked), headers, deadline) as upstream:
                    body = await upstream.read()
            except Failed as error:
                tries.failed(error)
                continue
            tries.succeeded()
            if (found := _json(body)) is None:
                raise CallError(502, f"{replicas.name} answered {path} with something else than a JSON object")
            return upstream.status, found
        raise CallError(tries.last.status, str(tries.last))

    async def close(self) -> None:
        """Returns when what clients have left behind is recorded."""
        if self._recording:
            await asyncio.wait(self._recording)

    def _planned(
        self, request: web.Request, attempt: ProxiedAttempt, endpoint: Endpoint, target: Target, asked: Json, start: int
    ) -> _Call:
        upstream = target.replicas.upstream
        if target.sampling and upstream.trainable:
            asked = {**target.sampling, **asked}
        made = plan(endpoint, asked, upstream.kind)
        if made.request.get("model") != target.served_as:
            made.request = {**made.request, "model": target.served_as}
        facts = CallFacts(
            operation=endpoint.operation,
            asked=made.asked,
            messages=made.messages,
            upstream=target.replicas.name,
            start=start,
            traceparent=request.headers.get("traceparent", ""),
            resources_id=attempt.resources_id,
            stream=bool(asked.get("stream")),
        )
        deadline = time.monotonic() + upstream.timeout_s
        return _Call(request, attempt, endpoint, target, made, deadline, facts, facts.stream)

    async def _made(self, call: _Call) -> web.StreamResponse:
        replicas, body = call.target.replicas, orjson.dumps(call.plan.request)
        key = self._cache_key(call, body)
        if key is not None and (found := self._cached(key)) is not None:
            return await self._repeated(call, found)
        headers = self._headers(call.request, replicas)
        tries = replicas.tries(call.attempt.rollout_id, call.deadline)
        while (replica := await tries.next()) is not None:
            call.again()
            try:
                async with replicas.post(replica, call.plan.path, body, headers, call.deadline) as upstream:
                    response = await self._answered(call, upstream, key)
            except Failed as error:
                tries.failed(error)
                if call.response is not None:
                    return await self._continued(call, tries, headers)
            else:
                tries.succeeded()
                return response
        last = tries.last
        return await self._refused(call, last.status, last.body, str(last), last.retry_after_s)

    async def _continued(self, call: _Call, tries: Tries, headers: dict[str, str]) -> web.StreamResponse:
        """Has another replica say the rest of a stream that one has begun to, and again, as long as there are tries."""
        replicas = call.target.replicas
        while replicas.upstream.trainable and (remainder := remainder_of(call.plan, call.reader)) is not None:
            call.go_on(remainder)
            call.held += [self._tell(call, chunk) for chunk in remainder.chunks]
            if remainder.request is None:
                return await self._finished(call)
            if told := b"".join(call.held):
                await self._send(call, told, {})
            call.held = []
            if (replica := await tries.next()) is None:
                break
            try:
                request = remainder.request
                if "max_tokens" not in request:
                    request = remainder.fitting(await self._context(call, replica, headers))
                body = orjson.dumps(request)
                async with replicas.post(replica, COMPLETIONS.path, body, headers, call.deadline) as upstream:
                    if upstream.status != 200:
                        raise Failed(f"the model server answered {upstream.status}", broken=False)
                    call.facts.continued += 1
                    call.version = upstream.headers.get(MODEL_VERSION)
                    response = await self._streamed(call, upstream, {})
            except Failed as error:
                tries.failed(error)
            else:
                tries.succeeded()
                return response
        return await self._broken(call, str(tries.last))

    @staticmethod
    async def _context(call: _Call, replica: Replica, headers: dict[str, str]) -> int:
        """Tokens that the model can have before it. Raises `Failed`."""
        replicas, asked = call.target.replicas, {"model": call.target.served_as, "prompt": ""}
        async with replicas.post(replica, "/tokenize", orjson.dumps(asked), headers, call.deadline) as upstream:
            found = _json(await upstream.read()) or {}
        if not isinstance(found.get("max_model_len"), int):
            raise Failed(f"{replicas.name} does not say how many tokens {asked['model']} can have", broken=False)
        return int(found["max_model_len"])

    @staticmethod
    def _headers(request: web.Request, replicas: Replicas) -> dict[str, str]:
        headers = {"Content-Type": "application/json", **replicas.authorization()}
        headers |= {name: request.headers[name] for name in _ASKED if name in request.headers}
        if replicas.upstream.kind == "anthropic":
            headers.setdefault("anthropic-version", ANTHROPIC_VERSION)
        return headers

    async def _answered(self, call: _Call, upstream: Exchange, key: bytes | None) -> web.StreamResponse:
        call.version = upstream.headers.get(MODEL_VERSION)
        told = {n: v for n, v in upstream.headers.items() if n.startswith(_TOLD)}
        if upstream.status != 200:
            body = await upstream.read()
            return await self._refused(call, upstream.status, body, f"the model server answered {upstream.status}")
        if upstream.content_type == "text/event-stream":
            return await self._streamed(call, upstream, told)
        body = await upstream.read()
        data = _json(body)
        if data is None:
            raise Failed(f"{call.target.replicas.name} answered with something else than a JSON object: {body[:200]!r}")
        self._understand(call, data, whole=True)
        if call.answer.aborted:
            raise Failed("a weight update has ended the call", broken=False)
        writer = call.writer
        if call.wants_stream and writer is not None:
            pieces = [writer.event(chunk) for chunk in chunks_of(data)]
            await self._record(call)
            await self._send(call, b"".join(pieces) + writer.end(), told)
            return await self._ended(call)
        await self._record(call)
        if key is not None:
            self._cache[key] = (time.monotonic() + self._cache_ttl_s, body)
            if len(self._cache) > CACHED_ANSWERS:
                self._cache.popitem(last=False)
        return web.Response(
            body=body if writer is None else orjson.dumps(writer.whole(data)),
            content_type="application/json",
            headers=told,
        )

    async def _streamed(self, call: _Call, upstream: Exchange, told: dict[str, str]) -> web.StreamResponse:
        """Forwards what comes as it comes, but for the beginning (before the first token, so that the call can still be
        made again) and the end (after which nothing but that is left)."""
        events, early = sse.Events(), b""
        async for piece in upstream.pieces():
            out = b""
            try:
                completed = events.feed(piece)
            except sse.EventTooLarge as error:
                raise Failed(str(error)) from error
            try:
                for event in completed:
                    told_now = self._read(call, event)
                    if call.reader.finished:
                        call.held.append(told_now)
                    else:
                        out += told_now
            except Failed:
                if call.response is not None and out:
                    await self._send(call, out, told)  # what has been read counts as sent
                raise
            if not call.reader.begun:
                early += out
                continue
            if call.facts.first_token is None:
                call.facts.first_token = time.time_ns()
            if out and (call.response is not None or not call.answer.aborted):
                await self._send(call, early + out, told)
                early = b""
        if not call.reader.finished:
            raise Failed(UPSTREAM_ENDED)
        if call.answer.aborted and (call.response is None or call.may_go_on):
            raise Failed("a weight update has ended the call", broken=False)
        if call.answer.error:
            if call.target.replicas.upstream.trainable:  # its engine may have died
                raise Failed(call.answer.error)
            return await self._broken(call, call.answer.error, early, told)
        return await self._finished(call, early, told)

    async def _finished(
        self, call: _Call, early: bytes = b"", told: dict[str, str] | None = None
    ) -> web.StreamResponse:
        """Nothing is missing of a stream: its end is sent when it is recorded."""
        try:
            await self._record(call)
        except CallError as error:
            return await self._broken(call, str(error), early, told, record=False)
        end = b"" if call.writer is None else call.writer.end()
        await self._send(call, early + b"".join(call.held) + end, told or {})
        return await self._ended(call)

    def _read(self, call: _Call, event: bytes) -> bytes:
        """Has the reader read it; returns what the client gets of it."""
        writer, payload = call.writer, sse.data_of(event)
        for comment in sse.comments_of(event) if event.startswith(b":") else ():
            name, _, value = comment.decode("utf-8", "replace").partition("=")
            if name == MODEL_VERSION:
                call.end_version = value
        if not payload or payload == b"[DONE]":
            return event if writer is None else b""
        data = _json(payload)
        if data is None:
            raise Failed(f"{call.target.replicas.name} streamed something else than JSON: {payload[:200]!r}")
        data = self._understand(call, data, whole=False)
        if writer is None:
            return event
        if call.answer.error:
            return b""
        if call.answer.aborted and call.may_go_on:  # what it has said counts, but not that this is the end
            choices = [{**choice, "finish_reason": None} for choice in data.get("choices") or ()]
            return writer.event({**data, "choices": choices}) if choices else b""
        return writer.event(data)

    def _tell(self, call: _Call, data: Json) -> bytes:
        """A piece of the answer that no server has sent."""
        assert call.writer is not None
        call.reader.event(data)
        return call.writer.event(data)

    @staticmethod
    def _understand(call: _Call, data: Json, *, whole: bool) -> Json:
        """What was read, in the terms of the call's first server."""
        try:
            if whole:
                call.reader.whole(data)
            else:
                if call.remainder is not None:
                    data = call.remainder.chunk(data)
                call.reader.event(data)
        except MALFORMED as error:
            name = call.target.replicas.name
            raise Failed(f"{name} answered in a form that {call.plan.path} does not have: {error!r}") from error
        return data

    async def _send(self, call: _Call, data: bytes, told: dict[str, str]) -> None:
        try:
            if call.response is None:
                headers = {**told, "Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
                response = web.StreamResponse(headers=headers)
                await response.prepare(call.request)
                call.response = response
            await call.response.write(data)
        except ConnectionError as error:
            raise _ClientGone from error

    async def _ended(self, call: _Call) -> web.StreamResponse:
        assert call.response is not None
        try:
            await call.response.write_eof()
        except ConnectionError as error:
            logger.debug("a client left before the end of its stream: %s", error)
        return call.response

    async def _broken(
        self, call: _Call, message: str, early: bytes = b"", told: dict[str, str] | None = None, record: bool = True
    ) -> web.StreamResponse:
        """The client has part of the answer: it gets an error as the remainder."""
        call.answer.error = message
        if record and not call.recorded:
            call.answer.finish_reasons = ["error"]
            await self._record(call, quietly=True)
        writer = call.writer
        if writer is not None:
            error = writer.error(message)
        else:
            error = sse.event(call.endpoint.error_body(message, 502), "error")
        await self._send(call, early + error, told or {})
        return await self._ended(call)

    async def _refused(
        self, call: _Call, status: int, body: bytes, message: str, retry_after_s: float = 0.0
    ) -> web.StreamResponse:
        """The server has said no, or nothing; the client is told in its own terms."""
        data = _json(body)
        if data is not None:
            error = data.get("error") or data.get("message") or data.get("detail")
            message = error_text(error) if error else message
        message = self._without_key(call, message)
        call.answer.error = message
        await self._record(call)
        headers = {"Retry-After": str(math.ceil(retry_after_s))} if retry_after_s else {}
        if data is not None and call.plan.path == call.endpoint.path and isinstance(data.get("error"), dict):
            safe = self._without_key(call, body.decode("utf-8", "replace"))
            return web.Response(text=safe, status=status, content_type="application/json", headers=headers)
        return web.json_response(call.endpoint.error_body(message, status), status=status, headers=headers)

    @staticmethod
    def _without_key(call: _Call, text: str) -> str:
        key = call.target.replicas.key.get_secret_value()
        return text.replace(key, "…") if key else text

    # --- The record

    async def _record(self, call: _Call, *, quietly: bool = False) -> None:
        """The call as a span, in the log. Raises `CallError` if the log doesn't take it, unless ``quietly``: it stays
        counted either way, so the attempt is not trained on with a call missing."""
        attempt, call.recorded = call.attempt, True
        attempt.spans += 1
        version = version_of(call.version_before, version_of(call.version, call.end_version))
        facts = call.facts
        facts.model_version = version or call.target.version or None
        span = call_span(attempt.rollout_id, attempt.attempt_id, attempt.spans, facts, call.answer, call.client_id())
        headers = {KIND_HEADER: span.kind.encode()}
        try:
            span = await self._blobs.keep(span)
            await self._sends.send(self._topics.events, span, key=attempt.rollout_id, headers=headers)
            self.recorded += 1
        except (BlobError, LogError, TimeoutError) as error:
            self.unrecorded += 1
            if quietly:
                logger.error("a call of attempt %s is not recorded: %s", attempt.attempt_id, error or "time-out")
                return
            if isinstance(error, TooLarge):
                raise CallError(413, f"too_large: {error}") from error
            raise CallError(503, f"the call could not be recorded: {error or 'time-out'}") from error

    async def _recorded_late(self, call: _Call) -> None:
        try:
            await self._record(call, quietly=True)
        finally:
            call.attempt.leave()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)

    # --- Answers that are given again

    def _cache_key(self, call: _Call, body: bytes) -> bytes | None:
        policy = call.target.replicas.upstream.trainable
        if not self._cache_ttl_s or policy or call.wants_stream or call.plan.request.get("temperature") != 0:
            return None
        return hashlib.sha256(call.plan.path.encode() + b"\0" + call.target.replicas.name.encode() + body).digest()

    def _cached(self, key: bytes) -> bytes | None:
        expires, body = self._cache.get(key, (0.0, b""))
        return body if expires > time.monotonic() else None

    async def _repeated(self, call: _Call, body: bytes) -> web.StreamResponse:
        """As a new answer, which has an id of its own."""
        data = orjson.loads(body)
        if "id" in data:
            data["id"] = f"{str(data['id']).partition('-')[0]}-{token_hex(16)}"
        call.reader.whole(data)
        call.facts.cached = True
        await self._record(call)
        writer = call.writer
        return web.Response(
            body=orjson.dumps(data if writer is None else writer.whole(data)), content_type="application/json"
        )


def _json(text: bytes) -> Json | None:
    """A JSON object; None if it is anything else."""
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
