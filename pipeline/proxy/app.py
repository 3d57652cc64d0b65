"""The LLM proxy's HTTP interface: it authorises and reads requests, and answers errors in the client's protocol.

    /rollout/{id}/attempt/{id}/v1/…     POST chat/completions, completions, responses, embeddings, messages,
                                        messages/count_tokens; GET models: bound to the attempt by path and key
    /rollout/{id}/attempt/{id}/close    POST: no more calls; answers {"spans": how many there were,
                                        "cancelled": those that it did not wait for}

Nothing else is passed on: a model server's other endpoints can't be reached through the proxy.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry

from millstream.consumers.control import ControlFollower
from millstream.consumers.log.port import Log
from millstream.pipeline.addresses import is_loopback, names_this_machine
from millstream.pipeline.protocols import anthropic, openai
from millstream.pipeline.protocols.answers import Json
from millstream.pipeline.protocols.endpoints import COUNT_TOKENS, ENDPOINTS, MALFORMED
from millstream.pipeline.protocols.json_text import loads
from millstream.pipeline.protocols.openai import BadRequest
from millstream.pipeline.proxy.attempts import AttemptPolicy, Attempts, ProxiedAttempt
from millstream.pipeline.proxy.cache import AnswerCache
from millstream.pipeline.proxy.calls import Calls
from millstream.pipeline.proxy.errors import CallError
from millstream.pipeline.proxy.metrics import ProxyMetrics
from millstream.pipeline.proxy.recorder import RecordedCalls, Recorder
from millstream.pipeline.proxy.upstreams.replicas import Failed, ReplicaPolicy
from millstream.pipeline.proxy.upstreams.targets import Targets
from millstream.producers.blob_store import Blobs
from millstream.producers.log.paced import PacePolicy
from millstream.producers.log.port import Producer
from millstream.schemas.attempt_keys import BadKey
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

NOT_THIS_MACHINE: Final = "without a secret the proxy answers requests to localhost only"
ATTEMPT: Final = "/rollout/{rollout_id:[0-9A-Za-z_.-]{1,100}}/attempt/{attempt_id:[0-9A-Za-z_.-]{1,100}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyPolicy:
    """What a proxy waits for, and how much it keeps."""

    body_s: float = 30.0  # for a request's body to arrive
    models_s: float = 5.0  # for the list of an upstream's models
    record_s: float = 30.0  # for a span's acknowledgement, before its call fails; covers the restart of a broker
    cache_bytes: int = 64 << 20  # of cached answers; some 10,000 of usual size
    attempts: AttemptPolicy = field(default_factory=AttemptPolicy)
    replicas: ReplicaPolicy = field(default_factory=ReplicaPolicy)


class Proxy:
    """An aiohttp application, `app`."""

    def __init__(
        self,
        log: Log,
        settings: Settings,
        policy: ProxyPolicy = ProxyPolicy(),
        *,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """``registry`` gets its metrics. Raises `ConfigError` naming the setting that does not fit."""
        self._policy = policy
        self._log = log
        self._settings = settings
        self._control = ControlFollower(log, settings.topics)
        self._targets = Targets(settings, self._control, policy.replicas)
        self._attempts = Attempts(
            settings.proxy_secret.get_secret_value(),
            shared_key=settings.proxy_shared_key.get_secret_value(),
            limits=settings.key_limits,
            policy=policy.attempts,
        )
        self._metrics = ProxyMetrics(registry)
        self._counts = RecordedCalls()
        self._recorder: Recorder
        self._calls: Calls
        self._producer: Producer
        gates = () if settings.proxy_secret.get_secret_value() else (_this_machine,)
        self.app = web.Application(client_max_size=settings.max_record_bytes, middlewares=gates)
        self.app.cleanup_ctx.append(self._lifespan)
        self.app.add_routes(
            [
                web.route("*", ATTEMPT + "/{rest:.*}", self._handle),
                web.get("/livez", _alive),
                web.route("*", "/{rest:.*}", _outside),
            ]
        )

    @property
    def in_flight(self) -> int:
        """Calls under way."""
        return self._attempts.in_flight

    @property
    def unrecorded(self) -> int:
        """Calls whose span the log did not take."""
        return self._counts.unrecorded

    @property
    def recorded(self) -> int:
        """Calls whose span the log has taken."""
        return self._counts.recorded

    async def _lifespan(self, _app: web.Application) -> AsyncIterator[None]:
        self._producer = self._log.producer(linger_ms=PacePolicy().linger_ms, room_s=0.0)  # never waits on the loop
        blobs = Blobs(self._settings.blob_url)
        self._recorder = Recorder(self._producer, self._settings.topics, blobs, self._policy.record_s, self._counts)
        cache = AnswerCache(self._settings.cache_ttl_s, self._policy.cache_bytes)
        self._calls = Calls(self._targets, self._recorder, cache, self._metrics)
        await self._control.start()
        yield
        await self._recorder.close()
        blobs.close()
        self._targets.close()
        await self._control.close()
        await asyncio.to_thread(self._producer.close)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        rest = "/" + request.match_info["rest"]
        endpoint = ENDPOINTS.get(rest)
        error_body = anthropic.error_body if rest.startswith("/v1/messages") else openai.error_body
        try:
            attempt = self._authorised(request)
            if request.method == "POST" and endpoint is not None:
                self._refuse_closed(attempt)
                text, asked = await self._body(request)
                self._refuse_closed(attempt)  # it may have ended while the body came; its calls have been counted
                return await self._calls.make(request, attempt, endpoint, text, asked)
            if request.method == "POST" and rest == "/close":
                return await self._close(attempt)
            if request.method == "POST" and rest == COUNT_TOKENS:
                return await self._count_tokens(request, attempt, (await self._body(request))[1])
            if request.method == "GET" and rest.startswith("/v1/models"):
                return await self._models(rest.removeprefix("/v1/models").strip("/"))
            raise CallError(404, f"unknown endpoint {request.method} {rest}; there are POST {', '.join(ENDPOINTS)}")
        except CallError as error:
            return web.json_response(error_body(str(error), error.status), status=error.status, headers=error.headers)
        except BadRequest as error:
            return web.json_response(error_body(str(error), 400), status=400)

    def _authorised(self, request: web.Request) -> ProxiedAttempt:
        given = request.headers.get("x-api-key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given.isascii():
            raise CallError(401, "the API key is not one of this proxy: it holds characters beyond ASCII")
        try:
            return self._attempts.authorised(request.match_info["rollout_id"], request.match_info["attempt_id"], given)
        except BadKey as error:
            raise CallError(401, str(error)) from error

    async def _body(self, request: web.Request) -> tuple[bytes, Json]:
        """As it came, and parsed."""
        try:
            if request.content.is_eof():  # it came with its head, as nearly all do
                text = await request.read()
            else:
                async with asyncio.timeout(self._policy.body_s):
                    text = await request.read()
        except TimeoutError:
            raise CallError(408, f"the request's body did not arrive within {self._policy.body_s:.0f} s") from None
        except web.HTTPRequestEntityTooLarge as error:
            raise CallError(413, f"the request is larger than max_record_bytes: {error.text}") from error
        try:
            found = loads(text)
        except ValueError as error:
            raise CallError(400, f"the body is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise CallError(400, "the body is not a JSON object")
        return text, found

    @staticmethod
    def _refuse_closed(attempt: ProxiedAttempt) -> None:
        if attempt.closed:  # 410: a status that no SDK retries
            raise CallError(410, f"attempt {attempt.attempt_id} has ended and can't call a model any more")

    async def _close(self, attempt: ProxiedAttempt) -> web.Response:
        if self._attempts.may_have_lost_calls(attempt):
            raise CallError(409, f"attempt {attempt.attempt_id} is older than this proxy, which can't count its calls")
        attempt.closed = True
        cancelled = 0
        if attempt.in_flight:
            try:
                await asyncio.wait_for(attempt.drained.wait(), self._policy.attempts.last_calls_s)
            except TimeoutError:
                cancelled = attempt.cancel_calls()
                await attempt.drained.wait()
        return web.json_response({"spans": attempt.spans} | ({"cancelled": cancelled} if cancelled else {}))

    async def _count_tokens(self, request: web.Request, attempt: ProxiedAttempt, asked: Json) -> web.StreamResponse:
        target = self._targets.of(str(asked.get("model") or ""), attempt.rollout_id, attempt.resources_id)
        path, body = COUNT_TOKENS, {**asked, "model": target.served_as}
        if target.replicas.upstream.kind == "vllm":
            try:
                chat = anthropic.to_chat(body)
            except MALFORMED as error:
                raise BadRequest(f"the request does not have the form of {COUNT_TOKENS}: {error!r}") from error
            path = "/tokenize"
            body = {name: chat[name] for name in ("model", "messages", "tools") if name in chat}
        elif target.replicas.upstream.kind == "openai":
            raise CallError(404, f"the server of model {asked.get('model')!r} does not count tokens")
        status, answer = await self._calls.ask(target, path, body, request)
        if status == 200 and "count" in answer:
            answer = {"input_tokens": answer["count"]}
        return web.json_response(answer, status=status)

    async def _models(self, name: str) -> web.Response:
        """In a form that both OpenAI's and Anthropic's SDK understand."""
        listed = await asyncio.gather(*map(self._models_of, self._targets.upstreams))
        names = list(dict.fromkeys([*self._targets.names(), *(model for models in listed for model in models)]))
        models = {each: _model(each) for each in names}
        if not name:
            ends = {"first_id": names[0] if names else None, "last_id": names[-1] if names else None}
            return web.json_response({"object": "list", "data": list(models.values()), "has_more": False, **ends})
        if name not in models:
            raise CallError(404, f"model {name!r} is unknown; known are {', '.join(names)}")
        return web.json_response(models[name])

    async def _models_of(self, upstream: str) -> list[str]:
        try:
            listed = await self._targets.upstreams[upstream].get("/v1/models", self._policy.models_s)
            served = [str(model["id"]) for model in listed["data"]]
        except (Failed, KeyError, TypeError) as error:
            logger.warning("the models of upstream %s can't be listed: %s", upstream, error)
            return []
        return [name for model in served if (name := self._targets.routed_to(upstream, model)) is not None]


def check_open(settings: Settings, host: str) -> None:
    """Raises `ConfigError` if other machines could reach a proxy that asks for no secret."""
    if not is_loopback(host) and not settings.proxy_secret.get_secret_value():
        raise ConfigError(
            f"the proxy at {host} is open to others: set proxy_secret (MILLSTREAM_PROXY_SECRET), which runners share"
        )


def _model(name: str) -> Json:
    shared = {"id": name, "object": "model", "created": 0, "owned_by": "millstream"}
    return {**shared, "type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z"}


@web.middleware
async def _this_machine(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Without a secret anybody can make a key: only programs of this machine may ask, and no web page may."""
    if not names_this_machine(request.headers.get("Host", "")):
        return web.json_response(openai.error_body(NOT_THIS_MACHINE, 403), status=403)
    return await handler(request)


async def _alive(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _outside(request: web.Request) -> web.Response:
    message = (
        f"{request.path} names no attempt: call the model within a rollout, or use the base URL of your attempt, "
        "/rollout/{rollout_id}/attempt/{attempt_id}/v1"
    )
    return web.json_response(openai.error_body(message, 400), status=400)
