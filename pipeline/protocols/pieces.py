"""The pieces of a chat completion's stream, put together: messages, tool calls, and the blocks that other protocols
make of them. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson

Json = dict[str, Any]
_ATOMS: Final = frozenset({"role", "id", "type", "name", "index"})  # strings that are repeated, and not continued


def add(message: Json, name: str, value: Any) -> None:
    """Adds a piece of one field to a message."""
    old = message.get(name)
    if value is None:
        return
    if isinstance(value, str) and isinstance(old, str) and name not in _ATOMS:
        message[name] = None  # so that the text has one owner, and grows in place
        old += value
        message[name] = old
    elif isinstance(value, list) and isinstance(old, list):
        old += value
    elif isinstance(value, list):
        message[name] = list(value)
    elif isinstance(value, dict):
        merged = message[name] = old if isinstance(old, dict) else {}
        for key, inner in value.items():
            add(merged, key, inner)
    elif value != "" or old is None:
        message[name] = value


def said(message: Json) -> tuple[str, str]:
    """Reasoning and text of a message, or of a piece of one. Servers name the reasoning ``reasoning`` (vLLM, Ollama,
    OpenRouter) or ``reasoning_content`` (DeepSeek, SGLang, llama.cpp), or give both as parts of ``content``
    (Mistral)."""
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    reasoning, content = reasoning if isinstance(reasoning, str) else "", message.get("content")
    if not isinstance(content, list):
        return reasoning, content if isinstance(content, str) else ""
    thoughts, texts = [reasoning], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "thinking":
            thoughts.append(_thinking(part))
        elif isinstance(text := part.get("text") or part.get("refusal"), str):
            texts.append(text)
    return "".join(thoughts), "".join(texts)


def _thinking(part: Json) -> str:
    found = part.get("thinking")
    return found if isinstance(found, str) else "".join(inner.get("text") or "" for inner in found or ())


class ToolCalls:
    """Tool calls from their pieces.

    Servers number the calls by ``index``, but some give null, none at all, or 0 for all. So a new id opens a new call,
    and so does a name behind complete arguments."""

    def __init__(self) -> None:
        self.all: list[Json] = []
        self._last_at: dict[Any, Json] = {}  # by index
        self._by_id: dict[Any, Json] = {}  # by index and id, and by id alone

    def add(self, piece: Json) -> Json:
        """The call that the piece belongs to, with the piece added."""
        index, call_id, function = piece.get("index"), piece.get("id"), piece.get("function") or {}
        call = self._of(index, call_id, function)
        self._last_at[index] = self._last_at[None] = call
        if call_id:
            call["id"] = call_id
            self._by_id[index, call_id] = self._by_id[call_id] = call
        made, arguments = call["function"], function.get("arguments")
        made["name"] = function.get("name") or made["name"]
        if arguments:
            add(made, "arguments", arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode())
        for name in piece.keys() - {"index", "id", "function"}:
            add(call, name, piece[name])
        return call

    def _of(self, index: Any, call_id: Any, function: Json) -> Json:
        if call_id:
            known = self._by_id.get(call_id if index is None else (index, call_id))
            if known is not None:
                return known
        last = self._last_at.get(index)
        if last is not None:
            if call_id and not last["id"]:
                return last
            if not call_id and not (function.get("name") and function.get("arguments") and complete(last)):
                return last
        call = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        self.all.append(call)
        return call


def complete(call: Json) -> bool:
    """Whether the arguments of a call are a whole JSON object."""
    arguments = call["function"]["arguments"].strip()
    if not arguments.endswith("}"):
        return False
    try:
        orjson.loads(arguments)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class Block:
    """Reasoning, text or a tool call. ``text``: what of it has not been written yet."""

    kind: Literal["thinking", "text", "tool_use"]
    text: str = ""
    call: Json | None = None
    sent: int = 0  # characters of the call's arguments
    begun: bool = False


class Blocks:
    """The blocks of an answer in their order, one open at a time, for protocols that don't interleave them: the pieces
    of a tool call wait until the one before it is complete."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._calls = ToolCalls()
        self._block_of: dict[int, Block] = {}  # by the identity of its call
        self._at = 0  # the block that is open

    @property
    def calls(self) -> list[Json]:
        return self._calls.all

    def add(self, delta: Json) -> Iterator[tuple[Block, str]]:
        """What can be written now: text or arguments, and the block that they belong to."""
        reasoning, text = said(delta)
        if reasoning:
            self._say("thinking", reasoning)
        if text:
            self._say("text", text)
        for piece in delta.get("tool_calls") or ():
            call = self._calls.add(piece)
            if id(call) not in self._block_of:
                block = self._block_of[id(call)] = Block("tool_use", call=call)
                self._blocks.append(block)
        return self._ready(last=False)

    def rest(self) -> Iterator[tuple[Block, str]]:
        """What is left at the end."""
        return self._ready(last=True)

    def _say(self, kind: Literal["thinking", "text"], piece: str) -> None:
        if not self._blocks or self._blocks[-1].kind != kind:
            self._blocks.append(Block(kind))
        self._blocks[-1].text += piece

    def _ready(self, *, last: bool) -> Iterator[tuple[Block, str]]:
        while self._at < len(self._blocks):
            block = self._blocks[self._at]
            call = block.call
            if call is not None:
                if not call["function"]["name"] and not last:
                    return
                arguments = call["function"]["arguments"]
                block.text, block.sent = arguments[block.sent :], len(arguments)
            if block.text or not block.begun:
                text, block.text, block.begun = block.text, "", True
                yield block, text
            if self._at == len(self._blocks) - 1 or not (last or call is None or complete(call)):
                return
            self._at += 1
