"""A model server in vLLM's form, whose tokens are words. It answers ``say A B C`` with "A B C", asks for the offered
tool if the prompt says ``call``, and can be made to fail, to wait, or to break off. Given the ids of a prompt and of
the beginning of its answer, it continues the answer."""

import asyncio
import json
import sys
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from millstream.pipeline.services.serve_aiohttp import serve

LOGPROB = -0.25
_ANSWERS: dict[tuple[int, ...], str] = {}  # by the ids of their prompts


def ids(text: str) -> list[int]:
    """The token ids of a text."""
    return [zlib.crc32(word.encode()) % 50_000 for word in text.split()]


def learn(prompt: list[int], answer: str) -> None:
    """A server that continues an answer has to know the whole."""
    _ANSWERS[tuple(prompt)] = answer


@dataclass
class Fault:
    """What happens to one request instead of an answer."""

    status: int = 0
    body: Any = None
    headers: dict[str, str] | None = None
    hang_up: bool = False  # before anything is answered
    break_after: int | None = None  # tokens of a stream, after which it hangs up; the finish reason counts as one
    abort_after: int | None = None  # tokens, after which a weight update ends it
    error_after: int | None = None  # tokens of a stream, after which the engine dies


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
        prompt = self._prompt(body)
        learn(prompt, text)
        if body.get("stream"):
            limit = body.get("max_completion_tokens") or body.get("max_tokens")
            return await self._stream(request, body, fault, prompt, text, reason, limit=limit)
        if fault.abort_after is not None:
            text, reason = " ".join(text.split()[: fault.abort_after]), "abort"
            message = {"role": "assistant", "content": text}
        choices = [
            {
                "index": index,
                "message": message,
                "finish_reason": reason,
                "stop_reason": None,
                "token_ids": ids(text) if body.get("return_token_ids") else None,
                "logprobs": {"content": [_logprob(word) for word in text.split()]} if body.get("logprobs") else None,
            }
            for index in range(body.get("n") or 1)
        ]
        answer = self._head(body, "chat.completion") | {"choices": choices}
        answer["usage"] = _usage(len(prompt), len(text.split()))
        if body.get("return_token_ids"):
            answer["prompt_token_ids"] = prompt
        return web.json_response(answer, headers={"x-model-version": self.version})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        try:
            body, fault = await self._begin(request)
        except _Answer as answer:
            return answer.response()
        prompt, made = body["prompt"], 0
        if isinstance(prompt, str):
            given, text = ids(prompt), prompt.removeprefix("say ")
            learn(given, text)
        else:
            given = prompt
            made, text = next(
                (len(given) - n, found) for n in range(len(given), 0, -1) if (found := _ANSWERS.get(tuple(given[:n])))
            )
        if body.get("stream"):
            return await self._stream(
                request, body, fault, given, text, "stop", chat=False, made=made, limit=body.get("max_tokens") or 16
            )
        logprobs = {"tokens": text.split(), "token_logprobs": [LOGPROB] * len(text.split())}
        tokens = {"prompt_token_ids": given, "token_ids": ids(text), "logprobs": logprobs}
        choice = {"index": 0, "text": text, "finish_reason": "stop", **tokens}
        head = self._head(body, "text_completion")
        return web.json_response({**head, "choices": [choice], "usage": _usage(len(given), len(ids(text)))})

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        fault: Fault,
        prompt: list[int],
        text: str,
        reason: str,
        *,
        limit: int | None,
        chat: bool = True,
        made: int = 0,
    ) -> web.StreamResponse:
        """``made``: words of the text that the prompt already holds; at most ``limit`` further ones are made."""
        words = text.split()[made:]
        if limit is not None and len(words) > limit:
            words, reason = words[:limit], "length"
        head = self._head(body, "chat.completion.chunk" if chat else "text_completion")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})

        async def send(data: dict[str, Any]) -> None:
            await response.write(f"data: {json.dumps({**head, **data})}\n\n".encode())

        async def choice(text: str, reason: str | None = None, **more: Any) -> None:
            said = {"delta": {"content": text}} if chat else {"text": text}
            await send({"choices": [{"index": 0, "finish_reason": reason, **said, **more}]})

        def hangs_up(number: int) -> bool:
            if fault.break_after == number:
                assert request.transport is not None
                request.transport.close()
            return fault.break_after == number

        try:
            await asyncio.sleep(self.token_s)
            version = response.headers["x-model-version"] = self.version
            await response.prepare(request)
            told = {"prompt_token_ids": prompt} if body.get("return_token_ids") else {}
            if chat:
                role = {"role": "assistant", "content": ""}
                await send({"choices": [{"index": 0, "delta": role, "finish_reason": None}], **told})
                told = {}
            offset = 0
            for number, word in enumerate(words):
                if number == 1:
                    await self.token_gate.wait()
                if number:
                    await asyncio.sleep(self.token_s)
                if hangs_up(number):
                    return response
                if fault.error_after == number:
                    await response.write(b'data: {"error": {"message": "EngineCore died"}}\n\ndata: [DONE]\n\n')
                    return response
                if fault.abort_after == number:
                    reason = "abort"
                    break
                if number and version != self.version:
                    version = self.version
                    await response.write(f": x-model-version={version}\n\n".encode())
                if self.tell_version:
                    word = f"{word}@{version}"
                if body.get("return_token_ids") and number >= self.lost_ids:
                    told["token_ids"] = ids(word)
                piece = f" {word}"[number + made == 0 :]
                if chat and body.get("logprobs"):
                    told["logprobs"] = {"content": [_logprob(piece)]}
                elif not chat and body.get("logprobs") is not None:
                    told["logprobs"] = {"tokens": [piece], "token_logprobs": [LOGPROB], "text_offset": [offset]}
                await choice(piece, **told)
                told, offset = {}, offset + len(piece)
            if hangs_up(len(words)):
                return response
            await choice("", reason)
            if hangs_up(len(words) + 1):
                return response
            if (body.get("stream_options") or {}).get("include_usage"):
                await send({"choices": [], "usage": _usage(len(prompt), len(words))})
            await response.write(f": x-model-version={version}\n\ndata: [DONE]\n\n".encode())
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise
        return response

    async def embeddings(self, request: web.Request) -> web.Response:
        body, _ = await self._begin(request)
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
        usage = {"prompt_tokens": 2, "total_tokens": 2}
        return web.json_response({"object": "list", "model": body["model"], "data": data, "usage": usage})

    async def tokenize(self, request: web.Request) -> web.Response:
        body, _ = await self._begin(request)
        tokens = self._prompt(body) if "messages" in body else ids(body["prompt"])
        return web.json_response({"count": len(tokens), "tokens": tokens, "max_model_len": 256})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "policy", "object": "model"}]})

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def pause(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        return web.Response()

    async def update(self, request: web.Request) -> web.Response:
        """New weights, during running requests: they make all further tokens."""
        self.version = request.match_info["version"]
        return web.Response()

    def _head(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{len(self.requests)}", "object": kind, "created": 1, "model": body["model"]}

    @staticmethod
    def _prompt(body: dict[str, Any]) -> list[int]:
        return ids(" ".join(f"{m['role']} {m.get('content')}" for m in body["messages"]))

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


def _usage(given: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def _logprob(token: str) -> dict[str, Any]:
    return {"token": token, "logprob": LOGPROB, "bytes": list(token.encode()), "top_logprobs": []}


async def main(port: str, version: str, answer: str, host: str = "127.0.0.1", token_s: str = "0.05") -> None:
    learn(ids(f"user say {answer}"), answer)
    server = PolicyServer(version, tell_version=True, token_s=float(token_s))
    async with serve(server.app, f"http://{host}:{port}"):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
