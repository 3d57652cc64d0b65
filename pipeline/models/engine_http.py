"""Serves the engine over HTTP, with OpenAI's chat completions in vLLM's form."""

import json
from typing import Any, Final

from aiohttp import web

from millstream.pipeline.models.engine import Completion, Engine, EngineClosed, Unsupported
from millstream.pipeline.protocols import model_version, sse
from millstream.pipeline.protocols.openai import chunks_of, error_body

MAX_BODY: Final = 16 << 20  # bytes of a request


def engine_app(engine: Engine) -> web.Application:
    """``POST /v1/chat/completions`` (also streamed; `model_version` says how it names its weights), ``POST /tokenize``,
    ``GET /v1/models`` and ``GET /health``. The caller closes the engine."""

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        if "X-Request-Id" in request.headers:
            body["request_id"] = request.headers["X-Request-Id"]
        stream, options = body.pop("stream", False), body.pop("stream_options", None) or {}
        try:
            answer = await engine.chat(body)
        except EngineClosed as error:
            return web.json_response(error_body(str(error), 503), status=503)
        if stream and answer.status == 200:
            return await _stream(request, answer, bool(options.get("include_usage")))
        headers = model_version.headers(answer.model_version, answer.versions)
        return web.json_response(answer.body, status=answer.status, headers=headers)

    async def tokenize(request: web.Request) -> web.Response:
        try:
            tokens = engine.render((await _body(request)).get("messages"))
        except Unsupported as error:
            return web.json_response(error.body, status=400)
        return web.json_response({"count": len(tokens), "tokens": tokens})

    async def models(_: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": engine.name, "object": "model", "created": 0, "owned_by": "millstream"}]}
        )

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"model_version": engine.version})

    app = web.Application(client_max_size=MAX_BODY)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat),
            web.post("/tokenize", tokenize),
            web.get("/v1/models", models),
            web.get("/health", health),
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


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except json.JSONDecodeError as error:
        raise _refused(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise _refused("the body must be a JSON object")
    return body


def _refused(message: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(text=json.dumps(error_body(message, 400)), content_type="application/json")
