"""Translates Anthropic's messages to OpenAI's chat completions and back, with tool calls and images. Pure.

With it an Anthropic client can talk to a policy, whose token ids only the chat endpoint gives.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from millstream.pipeline.protocols import sse
from millstream.pipeline.protocols.answers import Answer, ChatReader, Json, blocks_to_message
from millstream.pipeline.protocols.openai import BadRequest
from millstream.pipeline.protocols.pieces import Block, Blocks, said

# Fields that mean the same under another name. Unknown fields are passed on, for the server to judge.
_RENAMED: Final = {"stop_sequences": "stop"}
_OURS: Final = {"messages", "system", "tools", "tool_choice", "metadata", "thinking", "service_tier", "container"}
_STOP_REASON: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
_DELTA: Final = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
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
    """Tool results become messages of their own, and come first because they answer the turn before. Their images come
    in the user's message behind them: chat templates render tool results as text."""
    found: list[Json] = []
    images: list[Json] = []
    parts: list[Json] = []
    for block in blocks:
        if block.get("type") == "tool_result":
            content = block.get("content") or []
            inner = [_text(content)] if isinstance(content, str) else [_part(each, where) for each in content]
            text = "\n".join(part["text"] for part in inner if part["type"] == "text")
            shown = [part for part in inner if part["type"] == "image_url"]
            if shown:
                images += [_text(f"The images of tool result {block.get('tool_use_id')}:"), *shown]
            found.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            parts.append(_part(block, where))
    parts = images + parts
    if parts:
        plain = all(part["type"] == "text" for part in parts)
        content = "\n".join(part["text"] for part in parts) if plain else parts
        found.append({"role": "user", "content": content})
    return found


def _part(block: Json, where: str) -> Json:
    kind = block.get("type")
    if kind == "text":
        return _text(block.get("text", ""))
    if kind == "image":
        return {"type": "image_url", "image_url": {"url": _image(block, where)}}
    raise BadRequest(f"{where}: blocks of type {kind!r} can't be given to this model")


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
        raise BadRequest("for this model system prompts must be text")
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

    strict: bool = True

    def __init__(self, asked: Json) -> None:
        self._model = asked.get("model")
        self._stops = asked.get("stop_sequences") or []
        self._started = False
        self._blocks = Blocks()
        self._open: Block | None = None
        self._index = -1
        self._last: Json = {}  # the choice with the finish reason
        self._seen = ChatReader()

    def client_id(self, answer_id: str) -> str:
        return "msg_" + answer_id.removeprefix("chatcmpl-")

    def whole(self, body: Json) -> Json:
        choice = (body.get("choices") or [{}])[0]
        message, usage = choice.get("message") or {}, body.get("usage") or {}
        content: list[Json] = []
        reasoning, text = said(message)
        if reasoning:
            content.append({"type": "thinking", "thinking": reasoning, "signature": ""})
        if text:
            content.append(_text(text))
        calls = message.get("tool_calls") or ()
        for call in calls:
            function = call["function"]
            content.append(
                {"type": "tool_use", "id": call["id"], "name": function["name"], "input": _arguments(function)}
            )
        return {
            **self._message(str(body.get("id") or ""), body.get("model")),
            "content": content,
            **self._stopped(choice, called=bool(calls)),
            "usage": {
                "input_tokens": usage.get("prompt_tokens") or 0,
                "output_tokens": usage.get("completion_tokens") or 0,
            },
        }

    def event(self, data: Json) -> bytes:
        self._seen.event(data)
        if not (self._started or self._seen.answer.id or data.get("choices")):  # Azure's first chunk has neither
            return b""
        out = b"" if self._started else self._start()
        for choice in data.get("choices") or ():
            for block, piece in self._blocks.add(choice.get("delta") or {}):
                out += self._piece(block, piece)
            if choice.get("finish_reason"):
                self._last = choice
        return out

    def end(self) -> bytes:
        answer = self._seen.answer
        out = b"" if self._started else self._start()
        for block, piece in self._blocks.rest():
            out += self._piece(block, piece)
        usage = {"input_tokens": _prompt_tokens(answer), "output_tokens": answer.completion_tokens or 0}
        stopped = self._stopped(self._last, called=bool(self._blocks.calls))
        return (
            out
            + self._close()
            + sse.event({"type": "message_delta", "delta": stopped, "usage": usage}, "message_delta")
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

    def _stopped(self, choice: Json, *, called: bool) -> Json:
        """``called``: the answer has tool calls, which some servers end with "stop"."""
        reason = _STOP_REASON.get(choice.get("finish_reason") or "stop", "end_turn")
        if called and reason == "end_turn":
            reason = "tool_use"
        sequence = choice.get("stop_reason")  # vLLM's: the text that has ended it
        if reason == "end_turn" and sequence in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
        return {"stop_reason": reason, "stop_sequence": None}

    def _piece(self, block: Block, piece: str) -> bytes:
        out = b""
        if block is not self._open:
            out = self._close()
            self._open, self._index = block, self._index + 1
            start = {"type": "content_block_start", "index": self._index, "content_block": _opening(block)}
            out += sse.event(start, "content_block_start")
        if not piece:
            return out
        kind, name = _DELTA[block.kind]
        delta = {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, name: piece}}
        return out + sse.event(delta, "content_block_delta")

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return sse.event({"type": "content_block_stop", "index": self._index}, "content_block_stop")


def _opening(block: Block) -> Json:
    if block.call is not None:
        return {"type": "tool_use", "id": block.call["id"], "name": block.call["function"]["name"], "input": {}}
    return {"type": "thinking", "thinking": "", "signature": ""} if block.kind == "thinking" else _text("")


def _text(text: str) -> Json:
    return {"type": "text", "text": text}


def _prompt_tokens(answer: Answer) -> int:
    return answer.prompt_tokens or len(answer.prompt_token_ids or ())


def _arguments(function: Json) -> Any:
    """A tool call's arguments. If the model did not write a JSON object, its text becomes one."""
    text = function.get("arguments") or "{}"
    if isinstance(text, dict):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": text}


def error_body(message: str, http_status: int) -> Json:
    kind = _ERROR_KIND.get(http_status, "invalid_request_error" if http_status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}
