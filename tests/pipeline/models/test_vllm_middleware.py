"""The middleware of vLLM, around an application that answers as vLLM does; `tests/vllm` has the real one."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from millstream.deploy.vllm import millstream_middleware
from millstream.pipeline.protocols import sse

TOKEN = "token" * 8
PATH = "/v1/chat/completions"


class Engine:
    """``outputs``: of each, the version spans of its choices; the weights are ``version`` when they come."""

    def __init__(self, outputs: list[tuple[str, list[list[tuple[str, int, int]] | None]]]) -> None:
        self.version, self.outputs = "r.0.1", outputs

    async def get_weight_version(self) -> str:
        return self.version

    async def generate(self, **_: Any) -> AsyncIterator[Any]:
        for version, choices in self.outputs:
            self.version = version
            spans = [
                found and [SimpleNamespace(version=v, start=start, end=end) for v, start, end in found]
                for found in choices
            ]
            yield SimpleNamespace(outputs=[SimpleNamespace(weight_versions=each) for each in spans])


async def answered(
    monkeypatch: pytest.MonkeyPatch,
    outputs: list[tuple[str, list[list[tuple[str, int, int]] | None]]],
    *,
    stream: bool,
    adapter: str = "",
) -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body of one answer. The supervisor looks at the version behind each output."""
    monkeypatch.setenv(millstream_middleware.TOKEN_VARIABLE, TOKEN)
    engine, sent = Engine(outputs), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != PATH:
            return
        start = {"type": "http.response.start", "status": 200}
        found = engine.generate(lora_request=SimpleNamespace(lora_name=adapter) if adapter else None)
        if stream:
            await send(start | {"headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
            async for _ in found:
                await supervised()
                await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        else:
            _ = [output async for output in found]
            await send(start | {"headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    middleware = millstream_middleware.Versions(app)

    async def ask(path: str, *headers: tuple[bytes, bytes], to: Any) -> None:
        state = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
        await middleware({"type": "http", "method": "POST", "path": path, "headers": headers, "app": state}, None, to)

    async def nowhere(_: dict[str, Any]) -> None: ...

    async def supervised() -> None:
        await ask("/pause", (millstream_middleware.TOKEN_HEADER, TOKEN.encode()), to=nowhere)

    await supervised()
    await ask(PATH, to=send)
    return dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent[1:])


UPDATED = [("r.0.1", [None]), ("r.0.2", [None]), ("r.0.2", [[("r.0.1", 0, 2), ("r.0.2", 2, 5)]])]
RANGES = b'[[0,"r.0.1"],[2,"r.0.2"]]'


async def test_a_whole_answer_says_which_version_made_which_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    headers, _ = await answered(monkeypatch, UPDATED, stream=False)
    assert (headers[b"x-model-version"], headers[b"x-model-versions"]) == (b"mixed", RANGES)
    headers, _ = await answered(monkeypatch, [("r.0.1", [[("r.0.1", 0, 5)]])], stream=False)
    assert headers[b"x-model-version"] == b"r.0.1"
    assert b"x-model-versions" not in headers


async def test_a_stream_says_so_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    headers, body = await answered(monkeypatch, UPDATED, stream=True)
    assert headers[b"x-model-version"] == b"r.0.1"
    comments = [text for event in sse.Events().feed(body) for text in sse.comments_of(event)]
    end = [b"x-model-versions=" + RANGES, b"x-model-version=r.0.2"]
    assert comments == [b"x-model-version=r.0.2", *end]
    assert body.endswith(b"x-model-version=r.0.2\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize(
    ("outputs", "adapter", "version"),
    [
        ([("r.0.2", [[("r.0.1", 0, 2), ("r.0.2", 2, 5)], [("r.0.1", 0, 5)]])], "", b"mixed"),  # two choices
        ([("r.0.2", [[("r.0.1", 0, 2), ("r.0.2", 2, 5)]])], "mine@a.0.7", b"a.0.7"),
        ([("r.0.2", [None])], "", b"r.0.1"),  # vLLM has not labelled the tokens
    ],
)
async def test_where_it_is_not_known_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, outputs: Any, adapter: str, version: bytes
) -> None:
    for stream in (False, True):
        headers, body = await answered(monkeypatch, outputs, stream=stream, adapter=adapter)
        assert b"x-model-versions" not in headers
        assert b"x-model-versions" not in body
        assert stream or headers[b"x-model-version"] == version
