"""A small model server: OpenAI's chat completions and responses, Anthropic's messages, each plain or as a stream.

What it answers follows from what it is asked: the first tool offered is called once, its result is repeated, and
without tools the question is. A city called Nowhere is refused with a 400.
"""

import json
import re
from dataclasses import dataclass
from itertools import count
from typing import Any

from aiohttp import web

_numbers = count(1)


@dataclass
class Reply:
    text: str
    tool: str = ""  # to be called; then there is no text
    city: str = ""

    @property
    def arguments(self) -> str:
        return json.dumps({"city": self.city})


def reply(texts: list[str], tools: list[str], results: list[str]) -> Reply:
    """``texts``: of the user; ``tools``: names of those offered; ``results``: what tools have given so far."""
    city = next((found[1] for text in reversed(texts) if (found := re.search(r"weather in ([\w-]+)", text))), "")
    if city == "Nowhere":
        raise _refused("there is no Nowhere")
    handoff = next((name for name in tools if name.startswith("transfer_to")), "")
    if handoff and not results:
        return Reply("", handoff)
    if "weather" in tools and not any("degrees" in result or "no Atlantis" in result for result in results):
        return Reply("", "weather", city)
    return Reply(f"Tool: {results[-1]}" if results else f"You asked about {city}")


async def chat(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    if "stream_options" in asked and not asked.get("stream"):
        raise _refused("stream_options is only allowed when stream is enabled")
    messages = asked["messages"]
    answer = reply(
        [_plain(m["content"]) for m in messages if m["role"] == "user"],
        [tool["function"]["name"] for tool in asked.get("tools") or []],
        [_plain(m["content"]) for m in messages if m["role"] == "tool"],
    )
    if asked.get("response_format", {}).get("type") == "json_schema":
        answer.text = json.dumps({"city": "Paris", "degrees": 21})
    number = next(_numbers)
    base = {"id": f"chatcmpl-{number}", "created": 1, "model": f"{asked['model']}-served"}
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None}
    if answer.tool:
        arguments = answer.arguments if answer.city else "{}"
        call = {"id": f"call-{number}", "type": "function", "function": {"name": answer.tool, "arguments": arguments}}
        message["tool_calls"] = [call]
    finish = "tool_calls" if answer.tool else "stop"
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    if not asked.get("stream"):
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish}
        if asked.get("logprobs"):
            content = [{"token": t, "logprob": -0.5, "bytes": None, "top_logprobs": []} for t in "abc"]
            choice["logprobs"] = {"content": content}
        ids: dict[str, Any] = {}
        if asked.get("return_token_ids"):
            ids = {"prompt_token_ids": list(range(11))}
            choice["token_ids"] = [1, 2, 3]
        return web.json_response(
            base | {"object": "chat.completion", "choices": [choice], "usage": usage} | ids,
            headers={"x-model-version": "run.0.1"},
        )
    base["object"] = "chat.completion.chunk"
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word + " "} for word in answer.text.split()]
    deltas += [{"tool_calls": [{"index": 0} | call]} for call in message.get("tool_calls", [])]
    chunks = [base | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if asked.get("return_token_ids"):
        chunks[0]["prompt_token_ids"] = list(range(11))
        tokens = {"token_ids": [1, 2, 3], "logprobs": {"content": [{"token": t, "logprob": -0.5} for t in "abc"]}}
        chunks[1]["choices"][0] |= tokens
    chunks.append(base | {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if asked.get("stream_options", {}).get("include_usage"):
        chunks.append(base | {"choices": [], "usage": usage})
    events = [("", json.dumps(chunk)) for chunk in chunks] + [("", "[DONE]")]
    return await _events(request, events, {"x-model-version": "run.0.1"})


async def responses(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    given = asked["input"]
    answer = reply([given if isinstance(given, str) else _plain(given[-1]["content"])], [], [])
    number = next(_numbers)
    content = [{"type": "output_text", "text": answer.text, "annotations": []}]
    return web.json_response(
        {
            "id": f"resp-{number}",
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "model": f"{asked['model']}-served",
            "output": [
                {"type": "message", "id": f"msg-{number}", "status": "completed", "role": "assistant"}
                | {"content": content}
            ],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": {"input_tokens": 11, "output_tokens": 3, "total_tokens": 14}
            | {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}},
        }
    )


async def messages(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    blocks = [b for m in asked["messages"] if not isinstance(m["content"], str) for b in m["content"]]
    answer = reply(
        [m["content"] for m in asked["messages"] if m["role"] == "user" and isinstance(m["content"], str)],
        [tool["name"] for tool in asked.get("tools") or []],
        [_plain(b["content"]) for b in blocks if b["type"] == "tool_result"],
    )
    number = next(_numbers)
    block: dict[str, Any] = {"type": "text", "text": answer.text}
    if answer.tool:
        block = {"type": "tool_use", "id": f"toolu-{number}", "name": answer.tool, "input": {"city": answer.city}}
    message = {
        "id": f"msg-{number}",
        "type": "message",
        "role": "assistant",
        "model": f"{asked['model']}-served",
        "content": [block],
        "stop_reason": "tool_use" if answer.tool else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 11, "output_tokens": 3},
    }
    if not asked.get("stream"):
        return web.json_response(message)
    begun = message | {"content": [], "stop_reason": None, "usage": {"input_tokens": 11, "output_tokens": 1}}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": begun}]
    events.append({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    for word in answer.text.split():
        delta = {"type": "text_delta", "text": word + " "}
        events.append({"type": "content_block_delta", "index": 0, "delta": delta})
    events.append({"type": "content_block_stop", "index": 0})
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    events.append({"type": "message_delta", "delta": stop, "usage": {"output_tokens": 3}})
    events.append({"type": "message_stop"})
    return await _events(request, [(event["type"], json.dumps(event)) for event in events])


def _refused(why: str) -> web.HTTPBadRequest:
    error = {"message": why, "type": "invalid_request_error"}
    return web.HTTPBadRequest(text=json.dumps({"error": error}), content_type="application/json")


async def _events(
    request: web.Request, events: list[tuple[str, str]], headers: dict[str, str] | None = None
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **(headers or {})})
    await response.prepare(request)
    for name, data in events:
        await response.write((f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode())
    return response


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content)
    return str(content)


def app() -> web.Application:
    made = web.Application()
    made.add_routes(
        [
            web.post("/v1/chat/completions", chat),
            web.post("/v1/responses", responses),
            web.post("/v1/messages", messages),
        ]
    )
    return made
