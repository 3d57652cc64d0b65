"""OpenAI's responses in terms of its chat completions, and back, tool calls included. Pure.

So that a client of the responses interface can talk to a policy, whose token ids only the chat interface gives.
"""

import time
from typing import Any, Final

from millstream.pipeline.protocols import sse
from millstream.pipeline.protocols.answers import ChatReader, Json
from millstream.pipeline.protocols.openai import BadRequest, error_body
from millstream.pipeline.protocols.pieces import Block, Blocks, add, said

_RENAMED: Final = {"max_output_tokens": "max_completion_tokens"}
_OURS: Final = {"input", "instructions", "tools", "tool_choice", "text", "reasoning"}
# Fields about the service and not about the answer.
_IGNORED: Final = {"store", "include", "metadata", "user", "truncation", "service_tier", "background", "stream_options"}
_IGNORED_TOO: Final = {"prompt_cache_key", "safety_identifier", "prompt_cache_retention", "prompt"}
_ECHOED: Final = ("instructions", "metadata", "temperature", "top_p", "tools", "tool_choice", "parallel_tool_calls")


def to_chat(asked: Json) -> Json:
    """The equivalent chat request. Raises `BadRequest` naming what has no counterpart."""
    for name in ("previous_response_id", "conversation"):
        if asked.get(name):
            raise BadRequest(f"{name}: answers of this model are not stored; send the whole conversation as input")
    left_out = _OURS | _IGNORED | _IGNORED_TOO | {"previous_response_id", "conversation"}
    request = {_RENAMED.get(name, name): value for name, value in asked.items() if name not in left_out}
    request["messages"] = to_messages(asked)
    if asked.get("tools"):
        request["tools"] = [_tool(tool) for tool in asked["tools"]]
        if asked.get("tool_choice"):
            request["tool_choice"] = _tool_choice(asked["tool_choice"])
    if effort := (asked.get("reasoning") or {}).get("effort"):
        request["reasoning_effort"] = effort
    wanted = (asked.get("text") or {}).get("format") or {"type": "text"}
    if wanted["type"] == "json_schema":
        schema = {key: value for key, value in wanted.items() if key != "type"}
        request["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif wanted["type"] != "text":
        request["response_format"] = wanted
    return request


def to_messages(asked: Json) -> list[Json]:
    """The conversation as chat messages. Raises `BadRequest` naming the item."""
    found: list[Json] = []
    if asked.get("instructions"):
        found.append({"role": "system", "content": asked["instructions"]})
    given = asked.get("input")
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    if not isinstance(given, list):
        raise BadRequest("input must be text or a list of items")
    for number, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            role = "system" if item.get("role") == "developer" else item.get("role")
            found.append({"role": role, "content": _content(item.get("content"), f"input[{number}]")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments") or ""}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if found and found[-1]["role"] == "assistant":  # the text and the calls of one answer
                found[-1].setdefault("tool_calls", []).append(call)
            else:
                found.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            content = _content(item.get("output"), f"input[{number}]")
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind != "reasoning":  # only its own model can use it
            raise BadRequest(f"input[{number}]: items of type {kind!r} can't be given to this model")
    return found


def _content(content: Any, where: str) -> Any:
    if isinstance(content, str):
        return content
    parts: list[Json] = []
    for part in content or ():
        kind = part.get("type")
        if kind in ("input_text", "output_text", "text"):
            parts.append({"type": "text", "text": part.get("text", "")})
        elif kind == "refusal":
            parts.append({"type": "text", "text": part.get("refusal", "")})
        elif kind == "input_image" and part.get("image_url"):
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            raise BadRequest(f"{where}: content of type {kind!r} can't be given to this model")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        raise BadRequest(f"tools of type {tool.get('type')!r} are only available from OpenAI")
    function = {k: tool[k] for k in ("name", "description", "parameters", "strict") if tool.get(k) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


class ResponsesWriter:
    """Chat completions as answers to ``/v1/responses``."""

    strict: bool = True

    def __init__(self, asked: Json) -> None:
        self._asked = asked
        self._seen = ChatReader()
        self._number = -1
        self._started = False
        self._items: list[Json] = []  # output so far; the last may be open
        self._blocks = Blocks()
        self._open: Block | None = None
        self._created = int(time.time())

    def client_id(self, answer_id: str) -> str:
        return "resp_" + answer_id.removeprefix("chatcmpl-")

    def whole(self, body: Json) -> Json:
        choice = (body.get("choices") or [{}])[0]
        message, tail = choice.get("message") or {}, str(body.get("id") or "").removeprefix("chatcmpl-")
        items: list[Json] = []
        reasoning, text = said(message)
        if reasoning:
            items.append(_reasoning(f"rs_{tail}", reasoning))
        if text:
            items.append(_message(f"msg_{tail}", text, "completed"))
        for number, call in enumerate(message.get("tool_calls") or ()):
            items.append(_function_call(f"fc_{tail}_{number}", call["id"], call["function"], "completed"))
        return self._response(
            str(body.get("id") or ""),
            body.get("model"),
            items,
            body.get("usage") or {},
            _status(choice.get("finish_reason")),
        )

    def event(self, data: Json) -> bytes:
        self._seen.event(data)
        if not (self._started or self._seen.answer.id or data.get("choices")):  # Azure's first chunk has neither
            return b""
        out = b"" if self._started else self._start()
        for choice in data.get("choices") or ():
            for block, piece in self._blocks.add(choice.get("delta") or {}):
                out += self._piece(block, piece)
        return out

    def end(self) -> bytes:
        out = b"" if self._started else self._start()
        for block, piece in self._blocks.rest():
            out += self._piece(block, piece)
        out += self._close()
        answer = self._seen.answer
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        status = _status(next(iter(answer.finish_reasons), None))
        response = self._response(answer.id, answer.model, self._items, usage, status)
        return out + self._event(f"response.{status}", response=response)

    def error(self, message: str) -> bytes:
        return sse.event({"type": "error", "sequence_number": self._number + 1, **error_body(message, 500)}, "error")

    # One item of the output at a time is open.

    def _start(self) -> bytes:
        self._started = True
        answer = self._seen.answer
        response = self._response(answer.id, answer.model, [], None, "in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _piece(self, block: Block, piece: str) -> bytes:
        out = b"" if block is self._open else self._begin(block)
        item = self._items[-1]
        if block.kind == "tool_use":
            add(item, "arguments", piece)
        else:
            add(item["content"][0], "text", piece)
        if not piece:
            return out
        if block.kind == "text":
            return out + self._part("response.output_text.delta", delta=piece, logprobs=[])
        at = {"item_id": item["id"], "output_index": self._at, "delta": piece}
        if block.kind == "thinking":
            return out + self._event("response.reasoning_text.delta", content_index=0, **at)
        return out + self._event("response.function_call_arguments.delta", **at)

    def _begin(self, block: Block) -> bytes:
        out = self._close()
        number = len(self._items)
        if block.call is not None:
            name = {"name": block.call["function"]["name"], "arguments": ""}
            item = _function_call(f"fc_{self._tail}_{number}", block.call["id"], name, "in_progress")
        elif block.kind == "thinking":
            item = _reasoning(f"rs_{self._tail}_{number}", "")
        else:
            item = _message(f"msg_{self._tail}_{number}", "", "in_progress")
        self._open = block
        self._items.append(item)
        shown = {**item, "content": []} if block.kind == "text" else item
        out += self._event("response.output_item.added", output_index=self._at, item=shown)
        if block.kind == "text":
            out += self._part("response.content_part.added", part=_output_text(""))
        return out

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        item, out = self._items[-1], b""
        if self._open.kind == "text":
            part = item["content"][0]
            out = self._part("response.output_text.done", text=part["text"], logprobs=[])
            out += self._part("response.content_part.done", part=part)
        elif self._open.kind == "tool_use":
            done = {"arguments": item["arguments"], "name": item["name"]}
            out = self._event(
                "response.function_call_arguments.done", item_id=item["id"], output_index=self._at, **done
            )
        item["status"] = "completed"
        self._open = None
        return out + self._event("response.output_item.done", output_index=self._at, item=item)

    @property
    def _at(self) -> int:
        return len(self._items) - 1

    @property
    def _tail(self) -> str:
        return self._seen.answer.id.removeprefix("chatcmpl-")

    def _part(self, name: str, /, **values: Any) -> bytes:
        return self._event(name, item_id=self._items[-1]["id"], output_index=self._at, content_index=0, **values)

    def _event(self, name: str, /, **values: Any) -> bytes:
        self._number += 1
        return sse.event({"type": name, "sequence_number": self._number, **values}, name)

    def _response(self, answer_id: str, model: str | None, items: list[Json], usage: Json | None, status: str) -> Json:
        asked = self._asked
        response = {
            "id": self.client_id(answer_id),
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": model or asked.get("model"),
            "output": items,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": None,
        }
        response |= {name: asked[name] for name in _ECHOED if asked.get(name) is not None}
        if usage is not None:
            given, made = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
            response["usage"] = {
                "input_tokens": given,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": given + made,
            }
        return response


def _status(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def _output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": []}


def _message(item_id: str, text: str, status: str) -> Json:
    content = [_output_text(text)]
    return {"type": "message", "id": item_id, "role": "assistant", "status": status, "content": content}


def _reasoning(item_id: str, text: str) -> Json:
    return {"type": "reasoning", "id": item_id, "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def _function_call(item_id: str, call_id: Any, function: Json, status: str) -> Json:
    call = {"type": "function_call", "id": item_id, "call_id": call_id, "status": status}
    return {**call, "name": function.get("name"), "arguments": function.get("arguments") or ""}
