"""The walk of a model call: choose an upstream, ask it, relay the answer, record the call, end the answer.

Until something of the answer has been sent to the client, a call that fails is retried unnoticed. After that, another
replica of a policy goes on with it where it can. The end of an answer waits until the log has acknowledged the call's
span, and a call that can't be recorded fails: training on a trace with a hole would be worse.
"""

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Final

from aiohttp import web

from millstream.pipeline.protocols import model_version
from millstream.pipeline.protocols.answers import Answer, Json
from millstream.pipeline.protocols.endpoints import COMPLETIONS, Endpoint, Plan, plan
from millstream.pipeline.protocols.json_text import dumps, loads, loads_object
from millstream.pipeline.protocols.openai import BadRequest
from millstream.pipeline.proxy.attempts import ProxiedAttempt
from millstream.pipeline.proxy.cache import AnswerCache, cache_key
from millstream.pipeline.proxy.errors import CallError, refusal
from millstream.pipeline.proxy.limits import Busy, all_of
from millstream.pipeline.proxy.metrics import BROKEN, CLIENT_LEFT, ProxyMetrics
from millstream.pipeline.proxy.recorder import NotRecorded, Recorder
from millstream.pipeline.proxy.relay import Relay
from millstream.pipeline.proxy.spans import CallFacts
from millstream.pipeline.proxy.upstreams.http_client import COMPRESSED, Exchange
from millstream.pipeline.proxy.upstreams.replicas import Failed, Replicas, retry_after_s
from millstream.pipeline.proxy.upstreams.retries import Tries
from millstream.pipeline.proxy.upstreams.targets import Target, Targets
from millstream.producers.log_lines import rollout_fields
from millstream.schemas.spans import semconv

logger = logging.getLogger(__name__)

RETRY_S: Final = 5  # a broker that restarts is back within some seconds
ANTHROPIC_VERSION: Final = "2023-06-01"
# What is passed on of a client's headers, and of a server's.
_REQUEST_HEADERS: Final = ("anthropic-version", "anthropic-beta", "openai-beta")
_ANSWER_HEADERS: Final = (
    "x-request-id",
    "request-id",
    "openai-",
    "anthropic-",
    "x-ratelimit-",
    model_version.HEADER,
    "content-encoding",
)
_REFUSAL_HEADERS: Final = (*_ANSWER_HEADERS[:-1], "retry-after", "x-should-retry")


class _ClientGone(Exception):
    """The client can't be written to any more."""


@dataclass(slots=True)
class _Call:
    """One call under way."""

    request: web.Request
    body: bytes  # of the request, as it came
    attempt: ProxiedAttempt
    target: Target
    plan: Plan
    deadline: float
    facts: CallFacts
    relay: Relay
    headers: dict[str, str]  # of the client's answer
    task: "asyncio.Task[Any]"
    number: int | None = None  # by which it has its seed of the attempt's `CallSeeds`
    recorded: bool = False
    response: web.StreamResponse | None = None  # once something has been sent
    left: bool = False  # the client has gone, or its attempt has ended
    sent: int = 0  # bytes of the answer

    @property
    def answer(self) -> Answer:
        return self.relay.answer

    def restart(self) -> None:
        """Nothing of the last try counts."""
        self.relay.restart()
        self.facts.first_token = None

    def to_record(self) -> tuple[ProxiedAttempt, CallFacts, Answer, str]:
        """From now on it is recorded."""
        self.recorded = True
        self.attempt.asking.discard(self.task)
        self.facts.model_version = self.relay.version or self.target.version or None
        self.facts.response_versions = self.relay.versions
        return self.attempt, self.facts, self.answer, self.relay.client_id()


class Calls:
    """Makes model calls for clients."""

    def __init__(self, targets: Targets, recorder: Recorder, cache: AnswerCache, metrics: ProxyMetrics) -> None:
        self._targets = targets
        self._recorder = recorder
        self._cache = cache
        self._metrics = metrics

    async def make(
        self, request: web.Request, attempt: ProxiedAttempt, endpoint: Endpoint, body: bytes, asked: Json
    ) -> web.StreamResponse:
        """Answers the client. ``asked`` is the request's body, parsed. Raises `CallError` if nothing has been sent and
        there is no answer."""
        if self._recorder.full:
            raise _busy("the call could not be recorded: the log has taken no records for a while")
        began = time.monotonic()
        call = self._chosen(request, attempt, endpoint, body, asked)
        code = CLIENT_LEFT
        try:
            response = await self._made(call)
            if not call.left:
                code = BROKEN if call.response is not None and call.answer.error else str(response.status)
            if isinstance(response, web.Response) and isinstance(response.body, bytes):
                call.sent = len(response.body)
            return response
        except CallError as error:
            code = str(error.status)
            raise
        finally:
            facts = call.facts
            first_token_s = None if facts.first_token is None else max(facts.first_token - facts.start, 0) / 1e9
            seconds = time.monotonic() - began
            self._metrics.ended(facts.upstream, code, seconds, first_token_s, call.answer, cached=facts.cached)
            self._metrics.passed(len(body), call.sent)

    async def _made(self, call: _Call) -> web.StreamResponse:
        attempt = call.attempt
        attempt.enter()
        attempt.asking.add(call.task)
        answered = False
        try:
            response = await self._within_limits(call)
            answered = not call.answer.error
            return response
        except Busy as error:
            self._metrics.limited(error.limit)
            raise CallError(429, str(error), {"Retry-After": str(math.ceil(error.retry_after_s))}) from error
        except (asyncio.CancelledError, _ClientGone) as error:
            call.left = True
            if not call.recorded:
                call.answer.error = "its attempt has ended" if attempt.closed else "the client has gone"
                call.answer.finish_reasons = ["abort"]
                self._recorder.record_in_background(*call.to_record())
            if isinstance(error, _ClientGone) and call.response is not None:
                return call.response
            raise
        except CallError:
            raise
        except Exception as error:  # a fault of ours: the attempt must not be trained on without this call
            logger.exception("a call failed", extra=rollout_fields(attempt.rollout_id, attempt.attempt_id))
            call.answer.error = f"the proxy failed: {error!r}"
            if not call.recorded:
                await self._recorder.try_record(*call.to_record())
            if call.response is not None:
                return await self._break_off(call, call.answer.error)
            raise CallError(500, call.answer.error) from error
        finally:
            if attempt.seeds is not None and call.number is not None and not answered:
                attempt.seeds.give_back(call.number)
            attempt.asking.discard(call.task)
            attempt.leave()

    async def ask(self, target: Target, path: str, asked: Json, request: web.Request) -> tuple[int, Json]:
        """Something that is not a model call and is not recorded. Raises `CallError`."""
        replicas = target.replicas
        deadline = time.monotonic() + replicas.upstream.timeout_s
        headers = _server_headers(request, replicas)
        tries = Tries(replicas, "", deadline)
        while (replica := await tries.next()) is not None:
            try:
                async with replicas.post(replica, path, dumps(asked), headers, deadline) as upstream:
                    body = await upstream.read()
            except Failed as error:
                tries.failed(error)
                continue
            tries.succeeded()
            if (found := loads_object(body)) is None:
                raise CallError(502, f"{replicas.name} answered {path} with something that is not a JSON object")
            return upstream.status, found
        raise CallError(tries.last.status, str(tries.last))

    # --- Choose an upstream

    def _chosen(
        self, request: web.Request, attempt: ProxiedAttempt, endpoint: Endpoint, body: bytes, asked: Json
    ) -> _Call:
        start = time.time_ns()
        try:
            target = self._targets.of(str(asked.get("model") or ""), attempt.rollout_id, attempt.resources_id)
            upstream, given = target.replicas.upstream, asked
            if target.sampling and upstream.trainable:
                asked = {**target.sampling, **asked}
            made = plan(endpoint, asked, upstream.kind)
            relay = _relay(made, target)
        except BadRequest as error:
            raise CallError(400, str(error)) from error
        number = None
        if attempt.seeds is not None and made.policy and made.request.get("seed") is None:
            number = attempt.seeds.take()
            seed = {"seed": attempt.seeds.seed(number)}
            made.asked, made.request = made.asked | seed, made.request | seed
        if made.request.get("model") != target.served_as:
            made.request = {**made.request, "model": target.served_as}
        if made.request is not given:
            body = dumps(made.request)
        facts = CallFacts(
            operation=endpoint.operation,
            asked=made.asked,
            messages=made.messages,
            upstream=target.replicas.name,
            start=start,
            traceparent=request.headers.get("traceparent", ""),
            resources_id=attempt.resources_id,
            stream=bool(asked.get("stream")),
            aside=request.headers.get(semconv.ASIDE_HEADER, ""),
        )
        deadline = time.monotonic() + upstream.timeout_s
        return _Call(request, body, attempt, target, made, deadline, facts, relay, {}, _this_task(), number)

    async def _within_limits(self, call: _Call) -> web.StreamResponse:
        attempt, limiters = call.attempt, list(call.target.limiters)
        if attempt.limiter is not None:
            limiters.insert(0, attempt.limiter)
        if not limiters:
            return await self._ask(call)
        async with all_of(limiters, call.deadline):
            try:
                return await self._ask(call)
            finally:
                tokens = (call.answer.prompt_tokens or 0) + (call.answer.completion_tokens or 0)
                for limiter in limiters:
                    limiter.used(tokens)

    # --- Ask it

    async def _ask(self, call: _Call) -> web.StreamResponse:
        replicas, body = call.target.replicas, call.body
        key = self._cache_key(call, body)
        if key is not None and (cached := self._cache.get(key)) is not None:
            return await self._answer_again(call, cached)
        headers = _server_headers(call.request, replicas)
        tries = Tries(replicas, call.attempt.rollout_id, call.deadline)
        while (replica := await tries.next()) is not None:
            if tries.number > 1:
                self._metrics.retried(replicas.name)
                call.restart()
            try:
                async with replicas.post(replica, call.plan.path, body, headers, call.deadline) as upstream:
                    response = await self._relayed(call, upstream, key)
            except Failed as error:
                tries.failed(error)
                if call.relay.committed:
                    return await self._migrate(call, tries, headers)
            else:
                tries.succeeded()
                return response
        last = tries.last
        return await self._refuse(call, last.status, last.body, str(last), last.headers)

    async def _migrate(self, call: _Call, tries: Tries, headers: dict[str, str]) -> web.StreamResponse:
        """Has another replica go on with a stream that has broken, as often as there are tries."""
        replicas, relay = call.target.replicas, call.relay
        while (remainder := relay.migrate()) is not None:
            if (request := remainder.request) is None:
                return await self._finish(call)
            if held := relay.flush():
                await self._send(call, held)
            if (replica := await tries.next()) is None:
                break
            self._metrics.retried(replicas.name)
            try:
                if "max_tokens" not in request:
                    model = call.target.served_as
                    context = await replicas.context_length(replica, model, headers, call.deadline)
                    request = remainder.fitting(context)
                body = dumps(request)
                async with replicas.post(replica, COMPLETIONS.path, body, headers, call.deadline) as upstream:
                    if upstream.status != 200:
                        raise Failed(f"the model server answered {upstream.status}", broken=False)
                    call.facts.continued += 1
                    _start(relay, upstream)
                    response = await self._stream(call, upstream)
            except Failed as error:
                tries.failed(error)
            else:
                tries.succeeded()
                return response
        return await self._break_off(call, str(tries.last))

    # --- Relay the answer

    async def _relayed(self, call: _Call, upstream: Exchange, key: bytes | None) -> web.StreamResponse:
        _start(call.relay, upstream)
        if upstream.status != 200:
            body = await upstream.read()
            message = f"the model server answered {upstream.status}"
            return await self._refuse(call, upstream.status, body, message, upstream.headers)
        call.headers = {n: v for n, v in upstream.headers.items() if n.startswith(_ANSWER_HEADERS)}
        if call.headers.get("content-encoding", "").strip().lower() in COMPRESSED:
            del call.headers["content-encoding"]
        if upstream.content_type == "text/event-stream":
            return await self._stream(call, upstream)
        body = await upstream.read()
        if call.response is not None:  # a try before this one had begun to stream
            raise Failed(f"{call.target.replicas.name} did not answer with a stream", broken=False)
        as_stream = call.facts.stream and call.relay.translates
        answer = call.relay.whole(body, as_stream=as_stream)
        _check(call.relay)
        if as_stream:
            await self._record(call)
            await self._send(call, answer)
            return await self._end(call)
        response = await self._answer(call, answer)
        if key is not None and not (call.answer.flaw or call.answer.error):
            self._cache.put(key, body)
        return response

    async def _stream(self, call: _Call, upstream: Exchange) -> web.StreamResponse:
        relay, facts = call.relay, call.facts
        async for piece in upstream.pieces():
            passed = relay.feed(piece)
            if facts.first_token is None and relay.begun:
                facts.first_token = time.time_ns()
            if passed:
                await self._send(call, passed)
            if relay.failure is not None:
                break
        relay.end()
        _check(relay)
        if relay.answer.error:
            return await self._break_off(call, relay.answer.error)
        return await self._finish(call)

    async def _answer_again(self, call: _Call, body: bytes) -> web.StreamResponse:
        """An answer from the cache, as a new one with an id of its own."""
        data = loads(body)
        if isinstance(data, dict) and "id" in data:
            data["id"] = f"{str(data['id']).partition('-')[0]}-{token_hex(16)}"
        call.facts.cached = True
        return await self._answer(call, call.relay.whole(dumps(data), as_stream=False))

    def _cache_key(self, call: _Call, body: bytes) -> bytes | None:
        upstream = call.target.replicas.upstream
        if not self._cache.enabled or upstream.trainable or call.facts.stream:
            return None
        if call.plan.request.get("temperature") != 0:
            return None
        return cache_key(call.target.replicas.name, call.plan.path, body)

    # --- Record the call

    async def _record(self, call: _Call) -> None:
        """Raises `CallError` if the log does not take it."""
        try:
            await self._recorder.record(*call.to_record())
        except NotRecorded as error:
            if error.too_large:
                raise CallError(413, f"too_large: {error}") from error
            raise _busy(f"the call could not be recorded: {error}") from error

    # --- End the answer

    async def _answer(self, call: _Call, body: bytes) -> web.StreamResponse:
        await self._record(call)
        return web.Response(body=body, headers={"Content-Type": "application/json", **call.headers})

    async def _finish(self, call: _Call) -> web.StreamResponse:
        """A stream is complete: its end is sent when the call is recorded."""
        try:
            await self._record(call)
        except CallError as error:
            return await self._break_off(call, str(error))
        await self._send(call, call.relay.rest())
        return await self._end(call)

    async def _refuse(
        self, call: _Call, status: int, body: bytes, message: str, server_headers: Mapping[str, str]
    ) -> web.StreamResponse:
        """The server has refused, or not answered at all."""
        key = call.target.replicas.key.get_secret_value()
        call.answer.error, text = refusal(call.plan, status, body, message, key)
        if call.response is not None:
            return await self._break_off(call, call.answer.error)
        await self._record(call)
        headers = {name: value for name, value in server_headers.items() if name.startswith(_REFUSAL_HEADERS)}
        if not retry_after_s(headers.get("retry-after", "")):  # "inf" and the like
            headers.pop("retry-after", None)
        return web.Response(body=text, status=status, content_type="application/json", headers=headers)

    async def _break_off(self, call: _Call, message: str) -> web.StreamResponse:
        """The client of a stream gets an error instead of the rest."""
        call.answer.error = message
        if not call.recorded:
            call.answer.finish_reasons = ["error"]
            await self._recorder.try_record(*call.to_record())
        await self._send(call, call.relay.error(message))
        return await self._end(call)

    async def _send(self, call: _Call, data: bytes) -> None:
        try:
            if call.response is None:
                headers = {**call.headers, "Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
                response = web.StreamResponse(headers=headers)
                await response.prepare(call.request)
                call.response = response
            await call.response.write(data)
            call.sent += len(data)
        except ConnectionError as error:
            raise _ClientGone from error

    @staticmethod
    async def _end(call: _Call) -> web.StreamResponse:
        assert call.response is not None
        try:
            await call.response.write_eof()
        except ConnectionError as error:
            logger.debug("a client left before the end of its stream: %s", error)
        return call.response


def _busy(message: str) -> CallError:
    return CallError(503, message, {"Retry-After": str(RETRY_S)})


def _this_task() -> "asyncio.Task[Any]":
    task = asyncio.current_task()
    assert task is not None
    return task


def _relay(made: Plan, target: Target) -> Relay:
    return Relay(made, target.replicas.name, trainable=target.replicas.upstream.trainable)


def _start(relay: Relay, upstream: Exchange) -> None:
    relay.start(upstream.headers.get(model_version.HEADER), upstream.headers.get(model_version.RANGES))


def _check(relay: Relay) -> None:
    if relay.failure is not None:
        raise Failed(relay.failure.message, broken=relay.failure.broken)


def _server_headers(request: web.Request, replicas: Replicas) -> dict[str, str]:
    headers = {"Content-Type": "application/json", **replicas.authorization()}
    headers |= {name: request.headers[name] for name in _REQUEST_HEADERS if name in request.headers}
    if replicas.upstream.kind == "anthropic":
        headers.setdefault("anthropic-version", ANTHROPIC_VERSION)
    return headers
