"""The engine over HTTP, as a model server that speaks OpenAI's chat completions."""

import json

from aiohttp import web

from millstream.pipeline.backend import BackendUnavailable
from millstream.pipeline.engine import Engine
from millstream.pipeline.http_backend import MODEL_VERSION_HEADER


def engine_app(engine: Engine) -> web.Application:
    """``POST /v1/chat/completions`` (the header ``x-model-version`` says which weights answered), ``GET /v1/models``
    and ``GET /health``. The engine stays the caller's to close."""

    async def chat(request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except json.JSONDecodeError as error:
            return _error(400, f"the body is not JSON: {error}", "invalid_request_error")
        if not isinstance(body, dict):
            return _error(400, "the body has to be a JSON object", "invalid_request_error")
        if "X-Request-Id" in request.headers:
            body["request_id"] = request.headers["X-Request-Id"]
        try:
            answer = await engine.chat(body)
        except BackendUnavailable as error:
            return _error(503, str(error), "api_error")
        headers = {MODEL_VERSION_HEADER: answer.model_version} if answer.model_version is not None else {}
        return web.json_response(answer.body, status=answer.status, headers=headers)

    async def models(_: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": engine.name, "object": "model", "created": 0, "owned_by": "millstream"}]}
        )

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"model_version": engine.version})

    app = web.Application(client_max_size=16 << 20)
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models), web.get("/health", health)])
    return app


def _error(status: int, message: str, kind: str) -> web.Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return web.json_response(body, status=status)
