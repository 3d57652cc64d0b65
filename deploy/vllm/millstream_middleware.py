"""ASGI middleware for vLLM's API server (``--middleware millstream_middleware.Versions``).

It names the weights that made each answer in the header ``x-model-version``: for a whole answer the version of all its
tokens, or `mixed`; for a stream the version at its start, with comments ``: x-model-version=VERSION`` where it changes
and, before the end, for its last token. A comment may come a piece of the stream too early or too late. If the weights
changed within the only choice, ``x-model-versions`` (a header; at the end of a stream a comment) says exactly which
version made which tokens, as JSON ``[[first token, version], …]``: vLLM's last output of a request lists it.

And only with the supervisor's token it opens endpoints other than the model's.

It runs in vLLM's environment, where millstream is not installed, and imports nothing of it.
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
RANGES_HEADER: Final = b"x-model-versions"
MIXED: Final = "mixed"
UNNAMED: Final = "default"  # vLLM's name for weights without a version
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
    """The versions of the weights that made the tokens of one request, in order."""

    def __init__(self, version: str) -> None:
        self.versions: list[str] = []
        self.choices: list[list[tuple[int, str]]] = []  # of each, (first token, version)
        self.adapter = ""  # version of the requested LoRA adapter
        self._before = version  # when the request came

    def whole(self, now: str) -> str:
        versions = {self.adapter} if self.adapter else set(self.versions or [self._before, now])
        return versions.pop() if len(versions) == 1 else MIXED

    def last(self, now: str) -> str:
        return self.adapter or (self.versions or [now])[-1]

    @property
    def ranges(self) -> str:
        """Empty unless several versions made the tokens of the only choice."""
        if self.adapter or len(self.choices) != 1 or len(self.choices[0]) < 2:
            return ""
        return json.dumps(self.choices[0], separators=(",", ":"))


_answer: contextvars.ContextVar[_Answer] = contextvars.ContextVar("answer")


class Versions:
    """The middleware, around vLLM's application."""

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
        """Afterwards the weights may be others."""
        await self._app(scope, receive, self._labelling(send))
        self._version = await engine.get_weight_version()

    def _labelling(self, send: Any) -> Any:
        """A ``send`` that puts the versions into the answer."""
        answer = _Answer(self._version)
        _answer.set(answer)
        held: dict[str, Any] | None = None  # the start of a stream, until its first token shows the version
        streamed = ended = False
        named = ""  # the version named last

        async def out(message: dict[str, Any]) -> None:
            nonlocal held, streamed, ended, named
            if message["type"] == "http.response.start":
                streamed = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
                if streamed:
                    held = message
                else:
                    await send(_headed(message, answer.whole(self._version), answer.ranges))
                return
            if streamed and message["type"] == "http.response.body":
                if held is not None:
                    start, held = held, None
                    named = answer.adapter or self._version
                    await send(_headed(start, named))
                elif not answer.adapter and named != self._version and not ended:
                    named = self._version  # of what follows: weights change while no token is made
                    message = {**message, "body": _label(named) + message.get("body", b"")}
                body, last = message.get("body", b""), not message.get("more_body")
                if not ended and (last or body == DONE or body.endswith(b"\n" + DONE)):
                    ended = True
                    rest = DONE if body.endswith(DONE) else b""
                    label = _label(answer.last(self._version), answer.ranges)
                    message = {**message, "body": body[: len(body) - len(rest)] + label + rest}
            await send(message)

        return out


def _watch(engine: Any) -> None:
    """Notes the engine's outputs: the last one of a request names the weights of each token."""
    generate = engine.generate

    async def listening(outputs: Any, answer: _Answer | None) -> AsyncIterator[Any]:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if answer is not None:
                    for choice in output.outputs:
                        if choice.weight_versions:
                            answer.versions += [span.version for span in choice.weight_versions]
                            answer.choices.append([(span.start, span.version) for span in choice.weight_versions])
                yield output

    def watched(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        answer, adapter = _answer.get(None), kwargs.get("lora_request")
        if answer is not None and adapter is not None:
            answer.adapter = adapter.lora_name.rpartition("@")[2]  # NAME@VERSION
        return listening(generate(*args, **kwargs), answer)

    engine.generate = watched


def _label(version: str, ranges: str = "") -> bytes:
    detail = f": x-model-versions={ranges}\n\n" if ranges else ""
    return f"{detail}: x-model-version={version}\n\n".encode()


def _headed(start: dict[str, Any], version: str, ranges: str = "") -> dict[str, Any]:
    added = [(VERSION_HEADER, version.encode()), *([(RANGES_HEADER, ranges.encode())] if ranges else [])]
    return {**start, "headers": [*start["headers"], *added]}


async def _refuse(scope: Any, send: Any, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})
        return
    kind = "invalid_request_error" if status < 500 else "api_error"
    body = json.dumps({"error": {"message": text, "type": kind, "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
