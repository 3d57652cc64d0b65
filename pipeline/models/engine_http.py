"""Serves the engine over HTTP, with OpenAI's chat completions in vLLM's form."""

import asyncio
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from millstream.pipeline.addresses import names_this_machine
from millstream.pipeline.models.engine import Completion, Engine, EngineClosed, TooManyWaiting, Unsupported
from millstream.pipeline.protocols import model_version, sse
from millstream.pipeline.protocols.json_text import dumps, loads
from millstream.pipeline.protocols.openai import chunks_of, error_body


@dataclass(frozen=True, slots=True)
class EngineHttpPolicy:
    """What the engine's server takes of a client."""

    body_bytes: int = 2 << 20  # the largest context of a model that fits a laptop has some 500 KB of text
    body_s: float = 30.0  # for a body to arrive, as at the proxy
    retry_after_s: int = 1  # about a batch


def engine_app(engine: Engine, policy: EngineHttpPolicy = EngineHttpPolicy()) -> web.Application:
    """``POST /v1/chat/completions`` (also streamed; `model_version` says how it names its weights), ``POST /tokenize``,
    ``GET /v1/models``, ``GET /health`` and ``GET /weights`` (version and digest). Every error is in OpenAI's form;
    requests to other names than this machine's are refused, since there is no key. The caller closes the engine."""

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await _body(request, policy)
        if "X-Request-Id" in request.headers:
            body["request_id"] = request.headers["X-Request-Id"]
        stream, options = body.pop("stream", None) or False, body.pop("stream_options", None) or {}
        if not isinstance(stream, bool):
            return _refusal("stream must be true or false", 400)
        if not isinstance(options, dict):
            return _refusal("stream_options must be an object", 400)
        try:
            answer = await engine.chat(body)
        except EngineClosed as error:
            return _refusal(str(error), 503)
        except TooManyWaiting as error:
            return _refusal(str(error), 429, {"Retry-After": str(policy.retry_after_s)})
        if stream and answer.status == 200:
            return await _stream(request, answer, bool(options.get("include_usage")))
        headers = model_version.headers(answer.model_version, answer.versions)
        return web.json_response(answer.body, status=answer.status, headers=headers)

    async def tokenize(request: web.Request) -> web.Response:
        try:
            tokens = engine.render((await _body(request, policy)).get("messages"))
        except Unsupported as error:
            return web.json_response(error.body, status=400)
        return web.json_response({"count": len(tokens), "tokens": tokens})

    async def models(_: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": engine.name, "object": "model", "created": 0, "owned_by": "millstream"}]}
        )

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"model_version": engine.version})

    async def weights(_: web.Request) -> web.Response:
        version, sha256 = await asyncio.to_thread(engine.digest)
        return web.json_response({"model_version": version, "sha256": sha256})

    app = web.Application(client_max_size=policy.body_bytes, middlewares=[_errors])
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat),
            web.post("/tokenize", tokenize),
            web.get("/v1/models", models),
            web.get("/health", health),
            web.get("/weights", weights),
        ]
    )
    return app


async def _stream(request: web.Request, answer: Completion, usage: bool) -> web.StreamResponse:
    """A batch is generated as a whole, so the answer comes in one piece, in the form of a stream."""
    first, last = answer.versions[0][1], answer.versions[-1][1]
    response = web.StreamResponse(headers={model_version.HEADER: first, "Content-Type": "text/event-stream"})
    await response.prepare(request)
    pieces = [sse.event(chunk) for chunk in chunks_of(answer.body) if chunk["choices"] or usage]
    await response.write(b"".join(pieces) + model_version.comment(last, answer.versions) + sse.DONE)
    await response.write_eof()
    return response


class _Refused(Exception):
    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


async def _body(request: web.Request, policy: EngineHttpPolicy) -> dict[str, Any]:
    try:
        async with asyncio.timeout(policy.body_s):
            text = await request.read()
    except TimeoutError:
        raise _Refused(f"the request's body did not arrive within {policy.body_s:g} s", 408) from None
    except web.HTTPRequestEntityTooLarge:
        raise _Refused(f"the request is larger than {policy.body_bytes:,} bytes", 413) from None
    except (web.RequestPayloadError, ValueError) as error:  # a wrong Content-Encoding, or a broken one
        raise _Refused(f"the body can't be read: {error}") from error
    try:
        body = loads(text)
    except ValueError as error:
        raise _Refused(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise _Refused("the body must be a JSON object")
    return body


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    if not names_this_machine(request.headers.get("Host", "")):
        return _refusal("the engine answers requests to localhost only", 403)
    try:
        return await handler(request)
    except _Refused as error:
        return _refusal(str(error), error.status)
    except web.HTTPException as error:  # of the router: 404, 405
        return _refusal(f"{error.reason}: {request.method} {request.path}", error.status)


def _refusal(message: str, status: int, headers: dict[str, str] | None = None) -> web.Response:
    body = dumps(error_body(message, status))
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")
