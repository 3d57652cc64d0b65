"""ASGI middleware for vLLM's API server (``--middleware millstream_middleware.Versions``).

It says which weights made each answer, in the header ``x-model-version``: of a whole answer the version of all its
tokens, or `mixed`; of a stream the version at its start, and ``: x-model-version=VERSION`` where it changes, and before
its end that of its last token. And it lets nobody but the supervisor, who has the token, at anything but the model.

It lives in vLLM's environment, where millstream is not installed: nothing of it is imported here.
"""

import contextlib
import contextvars
import hmac
import json
import os
from collections.abc import AsyncIterator
from typing import Any, Final

TOKEN_VARIABLE: Final = "MILLSTREAM_VLLM_TOKEN"  # noqa: S105 - a variable's name
TOKEN_HEADER: Final = b"x-millstream-admin"
VERSION_HEADER: Final = b"x-model-version"
MIXED: Final = "mixed"
UNNAMED: Final = "default"  # vLLM's name for weights that nobody has named
PUBLIC: Final = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/tokenize"),  # by which proxies count tokens
    ("GET", "/v1/models"),
    ("GET", "/health"),
    ("GET", "/metrics"),
}
DONE: Final = b"data: [DONE]\n\n"


class _Answer:
    """Which weights the tokens of one request came from, in order."""

    def __init__(self, version: str) -> None:
        self.versions: list[str] = []
        self.adapter = ""  # version of the LoRA adapter that was asked for
        self._before = version  # when the request came

    def whole(self, now: str) -> str:
        versions = {self.adapter} if self.adapter else set(self.versions or [self._before, now])
        return versions.pop() if len(versions) == 1 else MIXED

    def last(self, now: str) -> str:
        return self.adapter or (self.versions or [now])[-1]


_answer: contextvars.ContextVar[_Answer] = contextvars.ContextVar("answer")


class Versions:
    """Wraps vLLM's application."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._token = os.environ[TOKEN_VARIABLE].encode()
        self._version = UNNAMED
        self._watched = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        engine = scope["app"].state.engine_client
        if not self._watched:
            self._watched = True
            _watch(engine)
        if hmac.compare_digest(dict(scope["headers"]).get(TOKEN_HEADER, b""), self._token):
            await self._supervised(scope, receive, send, engine)
        elif (scope.get("method"), scope["path"]) not in PUBLIC:
            await _refuse(scope, send, 404, f"{scope['path']} is not open here")
        elif self._version == UNNAMED:
            await _refuse(scope, send, 503, "the weights are not loaded yet")
        else:
            await self._app(scope, receive, self._labelling(send))

    async def _supervised(self, scope: Any, receive: Any, send: Any, engine: Any) -> None:
        """Whatever it was, afterwards the weights may be others."""
        await self._app(scope, receive, self._labelling(send))
        self._version = await engine.get_weight_version()

    def _labelling(self, send: Any) -> Any:
        """Puts the versions into an answer on its way out."""
        answer = _Answer(self._version)
        _answer.set(answer)
        held: dict[str, Any] | None = None  # the start of a stream, until its first token tells the version
        streamed = told = False
        said = ""

        async def out(message: dict[str, Any]) -> None:
            nonlocal held, streamed, told, said
            if message["type"] == "http.response.start":
                streamed = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
                if streamed:
                    held = message
                else:
                    await send(_headed(message, answer.whole(self._version)))
                return
            if streamed and message["type"] == "http.response.body":
                if held is not None:
                    start, held = held, None
                    said = answer.adapter or self._version
                    await send(_headed(start, said))
                elif not answer.adapter and said != self._version and not told:
                    said = self._version  # of what comes: weights change while nothing is made
                    message = {**message, "body": _label(said) + message.get("body", b"")}
                body, ends = message.get("body", b""), not message.get("more_body")
                if not told and (ends or body == DONE or body.endswith(b"\n" + DONE)):
                    told = True
                    rest = DONE if body.endswith(DONE) else b""
                    label = _label(answer.last(self._version))
                    message = {**message, "body": body[: len(body) - len(rest)] + label + rest}
            await send(message)

        return out


def _watch(engine: Any) -> None:
    """Listens to what the engine says of its outputs: their last one names the weights of each token."""
    generate = engine.generate

    async def listening(outputs: Any, answer: _Answer | None) -> AsyncIterator[Any]:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if answer is not None:
                    answer.versions += [v.version for c in output.outputs for v in c.weight_versions or ()]
                yield output

    def watched(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        answer, adapter = _answer.get(None), kwargs.get("lora_request")
        if answer is not None and adapter is not None:
            answer.adapter = adapter.lora_name.rpartition("@")[2]  # NAME@VERSION
        return listening(generate(*args, **kwargs), answer)

    engine.generate = watched


def _label(version: str) -> bytes:
    return f": x-model-version={version}\n\n".encode()


def _headed(start: dict[str, Any], version: str) -> dict[str, Any]:
    return {**start, "headers": [*start["headers"], (VERSION_HEADER, version.encode())]}


async def _refuse(scope: Any, send: Any, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})
        return
    kind = "invalid_request_error" if status < 500 else "api_error"
    body = json.dumps({"error": {"message": text, "type": kind, "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
