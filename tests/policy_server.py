"""A model server in vLLM's form, whose tokens are words. It answers ``say A B C`` with "A B C", asks for the tool that
is offered if told to ``call``, and can be made to fail, to wait, or to break off."""

import asyncio
import json
import sys
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from millstream.pipeline.serving import serve

LOGPROB = -0.25


def ids(text: str) -> list[int]:
    """The token ids of a text."""
    return [zlib.crc32(word.encode()) % 50_000 for word in text.split()]


@dataclass
class Fault:
    """What happens to one request instead of an answer."""

    status: int = 0
    body: Any = None
    headers: dict[str, str] | None = None
    hang_up: bool = False  # before anything is answered
    break_after: int | None = None  # tokens of a stream, after which it hangs up
    abort_after: int | None = None  # tokens, after which a weight update ends it


class PolicyServer:
    def __init__(self, version: str = "run.0.3", *, tell_version: bool = False, token_s: float = 0.0) -> None:
        """In a stream, ``tell_version``: each word is followed by ``@`` and the version that made it; ``token_s``:
        seconds that a word takes."""
        self.version = version
        self.tell_version = tell_version
        self.token_s = token_s
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.faults: deque[Fault] = deque()
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.token_gate = asyncio.Event()  # between the first token of a stream and the second
        self.token_gate.set()
        self.gone = asyncio.Event()  # a client has left
        self.lost_ids = 0  # token ids that a stream leaves out
        self.app = web.Application(client_max_size=64 << 20)
        self.app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
                web.post("/v1/embeddings", self.embeddings),
                web.post("/tokenize", self.tokenize),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.post("/pause", self.pause),
                web.post("/version/{version}", self.update),
            ]
        )

    async def _begin(self, request: web.Request) -> tuple[dict[str, Any], Fault]:
        body = await request.json()
        self.requests.append(body)
        self.paths.append(request.path)
        self.asked.set()
        fault = self.faults.popleft() if self.faults else Fault()
        if fault.hang_up:
            assert request.transport is not None
            request.transport.close()
            raise web.HTTPServiceUnavailable
        if fault.status:
            raise _Answer(fault)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.gone.set()
            raise
        return body, fault

    async def chat(self, request: web.Request) -> web.StreamResponse:
        try:
            body, fault = await self._begin(request)
        except _Answer as answer:
            return answer.response()
        message, reason = self._message(body)
        calls = message.get("tool_calls")
        text = json.dumps(calls[0]["function"]) if calls else message["content"]
        if body.get("stream"):
            return await self._stream(request, body, fault, text, reason)
        if fault.abort_after is not None:
            text, reason = " ".join(text.split()[: fault.abort_after]), "abort"
            message = {"role": "assistant", "content": text}
        prompt = self._prompt(body)
        choices = [
            {
                "index": index,
                "message": message,
                "finish_reason": reason,
                "stop_reason": None,
                "token_ids": ids(text) if body.get("return_token_ids") else None,
                "logprobs": _logprobs(text) if body.get("logprobs") else None,
            }
            for index in range(body.get("n") or 1)
        ]
        answer = self._head(body, "chat.completion") | {"choices": choices, "usage": _usage(prompt, text)}
        if body.get("return_token_ids"):
            answer["prompt_token_ids"] = ids(prompt)
        return web.json_response(answer, headers={"x-model-version": self.version})

    async def _stream(
        self, request: web.Request, body: dict[str, Any], fault: Fault, text: str, reason: str
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "x-model-version": self.version})
        await response.prepare(request)
        head, prompt = self._head(body, "chat.completion.chunk"), self._prompt(body)
        words = text.split()

        async def send(data: dict[str, Any]) -> None:
            await response.write(f"data: {json.dumps(data)}\n\n".encode())

        async def choice(delta: dict[str, Any], reason: str | None = None, **more: Any) -> None:
            await send({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason, **more}], **extra})

        extra = {"prompt_token_ids": ids(prompt)} if body.get("return_token_ids") else {}
        try:
            await choice({"role": "assistant", "content": ""})
            extra = {}
            for number, word in enumerate(words):
                if number == 1:
                    await self.token_gate.wait()
                if self.token_s:
                    await asyncio.sleep(self.token_s)
                if self.tell_version:
                    word = f"{word}@{self.version}"
                if fault.break_after == number:
                    assert request.transport is not None
                    request.transport.close()
                    return response
                if fault.abort_after == number:
                    reason = "abort"
                    break
                more: dict[str, Any] = {}
                if body.get("return_token_ids") and number >= self.lost_ids:
                    more["token_ids"] = ids(word)
                if body.get("logprobs"):
                    more["logprobs"] = _logprobs(word)
                await choice({"content": word if number == 0 else f" {word}"}, **more)
            await choice({}, reason)
            if (body.get("stream_options") or {}).get("include_usage"):
                await send({**head, "choices": [], "usage": _usage(prompt, text)})
            await response.write(f": x-model-version={self.version}\n\ndata: [DONE]\n\n".encode())
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise
        return response

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body, _ = await self._begin(request)
        text, prompt = body["prompt"].removeprefix("say "), body["prompt"]
        logprobs = {"tokens": text.split(), "token_logprobs": [LOGPROB] * len(text.split())}
        head = self._head(body, "text_completion")
        tokens = {"prompt_token_ids": ids(prompt), "token_ids": ids(text), "logprobs": logprobs}
        choice = {"index": 0, "text": text, "finish_reason": "stop", **tokens}
        if not body.get("stream"):
            return web.json_response({**head, "choices": [choice], "usage": _usage(prompt, text)})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number, word in enumerate(text.split()):
            one = {"tokens": [word], "token_logprobs": [LOGPROB]}
            part = {"index": 0, "text": f" {word}"[number == 0 :], "finish_reason": None, "logprobs": one}
            part |= {"token_ids": ids(word)} | ({"prompt_token_ids": ids(prompt)} if number == 0 else {})
            await response.write(f"data: {json.dumps({**head, 'choices': [part]})}\n\n".encode())
        end = {**head, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
        usage = {**head, "choices": [], "usage": _usage(prompt, text)}
        await response.write(f"data: {json.dumps(end)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        return response

    async def embeddings(self, request: web.Request) -> web.Response:
        body, _ = await self._begin(request)
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
        usage = {"prompt_tokens": 2, "total_tokens": 2}
        return web.json_response({"object": "list", "model": body["model"], "data": data, "usage": usage})

    async def tokenize(self, request: web.Request) -> web.Response:
        body, _ = await self._begin(request)
        tokens = ids(self._prompt(body))
        return web.json_response({"count": len(tokens), "tokens": tokens, "max_model_len": 256})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "policy", "object": "model"}]})

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def pause(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        return web.Response()

    async def update(self, request: web.Request) -> web.Response:
        """New weights, under running requests: what is made from now on is theirs."""
        self.version = request.match_info["version"]
        return web.Response()

    def _head(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{len(self.requests)}", "object": kind, "created": 1, "model": body["model"]}

    @staticmethod
    def _prompt(body: dict[str, Any]) -> str:
        return " ".join(f"{m['role']} {m.get('content')}" for m in body["messages"])

    @staticmethod
    def _message(body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        content = body["messages"][-1]["content"]
        said = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
        if said.startswith("call ") and body.get("tools"):
            name = body["tools"][0]["function"]["name"]
            function = {"name": name, "arguments": json.dumps({"city": said.removeprefix("call ")})}
            call = {"id": "call-1", "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
        return {"role": "assistant", "content": said.removeprefix("say ")}, "stop"


class _Answer(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault

    def response(self) -> web.Response:
        body = {"error": {"message": "no"}} if self._fault.body is None else self._fault.body
        return web.json_response(body, status=self._fault.status, headers=self._fault.headers)


def _usage(prompt: str, text: str) -> dict[str, int]:
    given, made = len(prompt.split()), len(text.split())
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def _logprobs(text: str) -> dict[str, Any]:
    return {
        "content": [{"token": word, "logprob": LOGPROB, "bytes": None, "top_logprobs": []} for word in text.split()]
    }


async def main(port: str, version: str) -> None:
    server = PolicyServer(version, tell_version=True, token_s=0.01)
    async with serve(server.app, f"http://127.0.0.1:{port}"):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
