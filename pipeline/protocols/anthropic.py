"""Translates Anthropic's messages to OpenAI's chat completions and back, with tool calls and images. Pure.

With it an Anthropic client can talk to a policy, whose token ids only the chat endpoint gives.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from millstream.pipeline.protocols import sse
from millstream.pipeline.protocols.answers import Answer, ChatReader, Json, blocks_to_message
from millstream.pipeline.protocols.openai import BadRequest

# Fields that mean the same under another name. Unknown fields are passed on, for the server to judge.
_RENAMED: Final = {"stop_sequences": "stop"}
_OURS: Final = {"messages", "system", "tools", "tool_choice", "metadata", "thinking", "service_tier", "container"}
_STOP_REASON: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
_ERROR_KIND: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def to_chat(asked: Json) -> Json:
    """The equivalent chat request. Raises `BadRequest` naming what has no counterpart."""
    request = {_RENAMED.get(name, name): value for name, value in asked.items() if name not in _OURS}
    request["messages"] = to_messages(asked)
    if asked.get("tools"):
        request["tools"] = [_tool(tool) for tool in asked["tools"]]
        choice = asked.get("tool_choice") or {}
        if choice:
            request["tool_choice"] = _tool_choice(choice)
        if choice.get("disable_parallel_tool_use"):
            request["parallel_tool_calls"] = False
    return request


def to_messages(asked: Json) -> list[Json]:
    """The conversation as OpenAI messages. Raises `BadRequest` naming the message."""
    found: list[Json] = []
    if system := asked.get("system"):
        found.append({"role": "system", "content": _joined(system)})
    messages = asked.get("messages")
    if not isinstance(messages, list):
        raise BadRequest("messages must be a list")
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            found.append({"role": message.get("role"), "content": content})
        elif isinstance(content, list):
            convert = _assistant if message.get("role") == "assistant" else _user
            found += convert(content, f"messages[{number}]")
        else:
            raise BadRequest(f"messages[{number}]: content must be text or a list of blocks")
    return found


def _user(blocks: Sequence[Json], where: str) -> list[Json]:
    """Tool results become messages of their own, and come first because they answer the turn before."""
    found: list[Json] = []
    parts: list[Json] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_result":
            content = block.get("content")
            text = content if isinstance(content, str) else _joined(content or [])
            found.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind == "text":
            parts.append({"type": "text", "text": block.get("text", "")})
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _image(block, where)}})
        else:
            raise BadRequest(f"{where}: blocks of type {kind!r} can't be given to this model")
    if parts:
        plain = all(part["type"] == "text" for part in parts)
        content = "\n".join(part["text"] for part in parts) if plain else parts
        found.append({"role": "user", "content": content})
    return found


def _assistant(blocks: Sequence[Json], where: str) -> list[Json]:
    for block in blocks:
        if block.get("type") not in ("text", "thinking", "tool_use", "redacted_thinking"):  # the last is encrypted
            raise BadRequest(f"{where}: blocks of type {block.get('type')!r} can't be given to this model")
    return [blocks_to_message(blocks)]


def _joined(content: Any) -> str:
    if isinstance(content, str):
        return content
    texts = [block["text"] for block in content if isinstance(block, dict) and isinstance(block.get("text"), str)]
    if len(texts) != len(content):
        raise BadRequest("for this model system prompts and tool results must be text")
    return "\n".join(texts)


def _image(block: Json, where: str) -> str:
    source = block.get("source") or {}
    if source.get("type") == "base64":
        return f"data:{source.get('media_type')};base64,{source.get('data')}"
    if source.get("type") == "url":
        return str(source.get("url"))
    raise BadRequest(f"{where}: images come as base64 or by URL, not as {source.get('type')!r}")


def _tool(tool: Json) -> Json:
    if tool.get("type") not in (None, "custom"):
        raise BadRequest(f"tool {tool.get('name')!r} is of type {tool['type']!r}, which only Anthropic's servers offer")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema") or {"type": "object"}}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(choice: Json) -> Any:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return {"any": "required", "none": "none"}.get(str(kind), "auto")


class AnthropicWriter:
    """Chat completions as answers to ``/v1/messages``."""

    def __init__(self, asked: Json) -> None:
        self._model = asked.get("model")
        self._stops = asked.get("stop_sequences") or []
        self._started = False
        self._block: tuple[str, int] | None = None  # kind of the open block; which tool call it is
        self._index = -1
        self._stop: Json = {"stop_reason": "end_turn", "stop_sequence": None}
        self._seen = ChatReader()

    def client_id(self, answer_id: str) -> str:
        return "msg_" + answer_id.removeprefix("chatcmpl-")

    def whole(self, body: Json) -> Json:
        choice = (body.get("choices") or [{}])[0]
        message, usage = choice.get("message") or {}, body.get("usage") or {}
        content: list[Json] = []
        if reasoning := message.get("reasoning"):
            content.append({"type": "thinking", "thinking": reasoning, "signature": ""})
        if text := message.get("content"):
            content.append({"type": "text", "text": text})
        for call in message.get("tool_calls") or ():
            function = call["function"]
            content.append(
                {"type": "tool_use", "id": call["id"], "name": function["name"], "input": _arguments(function)}
            )
        return {
            **self._message(str(body.get("id") or ""), body.get("model")),
            "content": content,
            **self._stopped(choice),
            "usage": {
                "input_tokens": usage.get("prompt_tokens") or 0,
                "output_tokens": usage.get("completion_tokens") or 0,
            },
        }

    def event(self, data: Json) -> bytes:
        self._seen.event(data)
        out = b"" if self._started else self._start()
        for choice in data.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("reasoning"):
                out += self._piece(("thinking", 0), {"type": "thinking_delta", "thinking": delta["reasoning"]})
            if delta.get("content"):
                out += self._piece(("text", 0), {"type": "text_delta", "text": delta["content"]})
            for call in delta.get("tool_calls") or ():
                function = call.get("function") or {}
                at = ("tool_use", call.get("index", 0))
                opening = {"id": call.get("id"), "name": function.get("name"), "input": {}}
                piece = {"type": "input_json_delta", "partial_json": function.get("arguments") or ""}
                out += self._piece(at, piece, opening)
            if choice.get("finish_reason"):
                self._stop = self._stopped(choice)
        return out

    def end(self) -> bytes:
        answer = self._seen.answer
        out = b"" if self._started else self._start()
        usage = {"input_tokens": _prompt_tokens(answer), "output_tokens": answer.completion_tokens or 0}
        return (
            out
            + self._close()
            + sse.event({"type": "message_delta", "delta": self._stop, "usage": usage}, "message_delta")
            + sse.event({"type": "message_stop"}, "message_stop")
        )

    def error(self, message: str) -> bytes:
        return sse.event(error_body(message, 500), "error")

    def _start(self) -> bytes:
        self._started = True
        answer = self._seen.answer
        usage = {"input_tokens": _prompt_tokens(answer), "output_tokens": 0}
        nothing: Json = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return sse.event(
            {"type": "message_start", "message": self._message(answer.id, answer.model) | nothing}, "message_start"
        )

    def _message(self, answer_id: str, model: str | None) -> Json:
        head = {"id": self.client_id(answer_id), "type": "message", "role": "assistant"}
        return head | {"model": model or self._model}

    def _stopped(self, choice: Json) -> Json:
        reason = _STOP_REASON.get(choice.get("finish_reason") or "stop", "end_turn")
        sequence = choice.get("stop_reason")  # vLLM's: the text that has ended it
        if reason == "end_turn" and sequence in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
        return {"stop_reason": reason, "stop_sequence": None}

    def _piece(self, block: tuple[str, int], delta: Json, opening: Json | None = None) -> bytes:
        out = b""
        if block != self._block:
            out = self._close()
            self._block, self._index = block, self._index + 1
            empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}.get(block[0], {})
            begun = {"type": block[0], **empty, **(opening or {})}
            start = {"type": "content_block_start", "index": self._index, "content_block": begun}
            out += sse.event(start, "content_block_start")
        if delta.get("partial_json") == "":
            return out
        return out + sse.event(
            {"type": "content_block_delta", "index": self._index, "delta": delta}, "content_block_delta"
        )

    def _close(self) -> bytes:
        if self._block is None:
            return b""
        self._block = None
        return sse.event({"type": "content_block_stop", "index": self._index}, "content_block_stop")


def _prompt_tokens(answer: Answer) -> int:
    return answer.prompt_tokens or len(answer.prompt_token_ids or ())


def _arguments(function: Json) -> Any:
    """A tool call's arguments. If the model did not write a JSON object, its text becomes one."""
    try:
        found = json.loads(function.get("arguments") or "{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"arguments": function.get("arguments")}


def error_body(message: str, http_status: int) -> Json:
    kind = _ERROR_KIND.get(http_status, "invalid_request_error" if http_status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}
