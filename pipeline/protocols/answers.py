"""Reads what a model server answers, whole or event by event, in each protocol. Pure.

Each reader gathers one answer. Token ids are the engine's own (vLLM's ``return_token_ids``): nothing is tokenised
again.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from millstream.pipeline.protocols.pieces import Json as Json
from millstream.pipeline.protocols.pieces import ToolCalls, add, said

ABORTED: Final = "abort"  # vLLM's finish reason of an answer that a weight update ended
UPSTREAM_ENDED: Final = "the stream ended before the answer did"
RECENT: Final = 32  # pieces of a stream whose tokens' texts are kept


@dataclass(slots=True)
class Answer:
    """One answer; without a ``message`` if it has several choices, or none that is text."""

    id: str = ""
    model: str = ""
    created: int = 0  # s since the epoch, in OpenAI's protocols
    message: Json | None = None  # OpenAI's form
    messages: list[Json] | None = None  # of all choices, if there are several
    finish_reasons: list[str | None] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    error: str = ""  # what the server reported instead, or what broke the stream
    flaw: str = ""  # why it can't be trained on, although it is an answer

    @property
    def aborted(self) -> bool:
        return ABORTED in self.finish_reasons

    @property
    def untrainable(self) -> str | None:
        """Why it can't be trained on, as far as the answer itself shows it."""
        if self.flaw:
            return self.flaw
        if self.token_ids is None or self.completion_tokens is None:
            return None
        if len(self.token_ids) != self.completion_tokens:
            return f"{len(self.token_ids)} token ids, but the server counted {self.completion_tokens} tokens"
        return None

    def blemish(self, flaw: str) -> None:
        """The first flaw counts."""
        self.flaw = self.flaw or flaw

    def count(self, prompt: Any, completion: Any) -> None:
        """Takes over what a server says of the numbers of tokens, unless it is not a number."""
        if isinstance(prompt, int | float):
            self.prompt_tokens = int(prompt)
        if isinstance(completion, int | float):
            self.completion_tokens = int(completion)


class Reader(Protocol):
    """Gathers one answer."""

    answer: Answer

    @property
    def begun(self) -> bool:
        """Something of the answer itself has come: from here on the call can't be retried unnoticed."""

    @property
    def finished(self) -> bool:
        """Only the end of the stream follows."""

    def whole(self, body: Json) -> Answer: ...

    def event(self, data: Json) -> None:
        """The JSON of one event of a stream."""


class ChatReader:
    """``/v1/chat/completions``; with ``text`` the older ``/v1/completions``. ``echo``: the answer repeats its
    prompt."""

    def __init__(self, choices: int = 1, *, text: bool = False, echo: bool = False) -> None:
        self.answer = Answer()
        self.begun = False
        self.finished = False
        self._expected = choices
        self._text = text
        self._echo = echo
        self._choices: dict[int, _Choice] = {}

    def whole(self, body: Json) -> Answer:
        self.event(body)
        return self.answer

    def event(self, data: Json) -> None:
        answer = self.answer
        if error := data.get("error"):
            answer.error = error_text(error)
            self.finished = True
            return
        if not answer.id:
            answer.id, answer.model = str(data.get("id") or ""), str(data.get("model") or "")
            answer.created = data.get("created") or 0
        if usage := data.get("usage"):
            answer.count(usage.get("prompt_tokens"), usage.get("completion_tokens"))
        if data.get("prompt_token_ids") is not None:
            answer.prompt_token_ids = data["prompt_token_ids"]
        for given in data.get("choices") or ():
            index = given.get("index") or 0
            choice = self._choices.get(index)
            if choice is None:
                choice = self._choices[index] = _Choice()
            if given.get("prompt_token_ids") is not None:  # of completions
                answer.prompt_token_ids = given["prompt_token_ids"]
            choice.add(given)
            self.begun = self.begun or choice.begun
            if choice.finish_reason is not None and not self.finished:
                ended = sum(each.finish_reason is not None for each in self._choices.values())
                self.finished = ended >= self._expected
        if self._choices:
            self._settle()

    def recent(self) -> list[tuple[str, list[str]]]:
        """The last `RECENT` pieces of the only choice, from the present server: the text of each, and the texts of its
        tokens, as the server gives them beside their log-probabilities."""
        pieces = []
        for given, logprobs in self._choices[0].recent if 0 in self._choices else ():
            text = given["text"] if "text" in given else (given.get("delta") or {}).get("content")
            content = logprobs.get("content")
            pieces.append((text or "", logprobs["tokens"] if content is None else [each["token"] for each in content]))
        return pieces

    def go_on(self, dropped: int, *, ended: bool) -> None:
        """Another stream continues the only choice, without its last ``dropped`` tokens. ``ended``: the choice is
        complete, and only the stream is broken."""
        choice = self._choices[0]
        for kept in (choice.token_ids, choice.logprobs):
            if kept:
                del kept[len(kept) - dropped :]
        if not ended:
            choice.finish_reason = None
        self.finished = ended
        choice.recent.clear()
        self.answer.error = ""
        self._settle()

    def _settle(self) -> None:
        answer = self.answer
        if len(self._choices) == self._expected == 1:
            (one,) = self._choices.values()
            answer.finish_reasons = [one.finish_reason]
            answer.message, answer.token_ids, answer.logprobs = one.message, one.token_ids, one.logprobs
            if self._echo:
                answer.blemish("the answer repeats its prompt (echo)")
                if one.logprobs and one.token_ids is not None:  # the prompt's come first
                    answer.logprobs = one.logprobs[len(one.logprobs) - len(one.token_ids) :]
            return
        choices = [choice for _, choice in sorted(self._choices.items())]
        answer.finish_reasons = [choice.finish_reason for choice in choices]
        answer.message = answer.token_ids = answer.logprobs = None
        answer.messages = [choice.message for choice in choices]
        answer.blemish(f"the call has {max(self._expected, len(choices))} choices; calls with one can be trained on")


class _Choice:
    def __init__(self) -> None:
        self.message: Json = {"role": "assistant", "content": None}
        self.finish_reason: str | None = None
        self.token_ids: list[int] | None = None
        self.logprobs: list[float] | None = None
        self.recent: deque[tuple[Json, Json]] = deque(maxlen=RECENT)  # pieces of a stream, and their log-probabilities
        self._calls: ToolCalls | None = None

    @property
    def begun(self) -> bool:
        message = self.message
        if message["content"] or self.finish_reason not in (None, ABORTED):
            return True
        return any(value for name, value in message.items() if name != "role")

    def add(self, given: Json) -> None:
        if isinstance(given.get("message"), dict):
            self.message = {"content": None, **given["message"]}
        elif "text" in given:
            add(self.message, "content", given["text"])
        else:
            self._delta(given.get("delta") or {})
        self.finish_reason = given.get("finish_reason") or self.finish_reason
        if (ids := given.get("token_ids")) is not None:
            self.token_ids = [] if self.token_ids is None else self.token_ids
            self.token_ids += ids
        if logprobs := given.get("logprobs"):
            self.recent.append((given, logprobs))
            new = logprobs.get("token_logprobs")
            if new is None:
                new = [token["logprob"] for token in logprobs.get("content") or ()]
            self.logprobs = [] if self.logprobs is None else self.logprobs
            self.logprobs += new

    def _delta(self, delta: Json) -> None:
        message = self.message
        for name, value in delta.items():
            if name == "tool_calls":
                if value:
                    self._calls = self._calls or ToolCalls()
                    message["tool_calls"] = self._calls.all
                    for call in value:
                        self._calls.add(call)
            elif name == "content" and isinstance(value, list):
                self._parts(value)
            else:
                add(message, name, value)

    def _parts(self, parts: list[Any]) -> None:
        reasoning, text = said({"content": parts})
        if reasoning:
            add(self.message, "reasoning", reasoning)
        if text:
            add(self.message, "content", text)
        others = [part for part in parts if isinstance(part, dict) and said({"content": [part]}) == ("", "")]
        if others:
            add(self.message, "parts", others)


class AnthropicReader:
    """``/v1/messages``. ``answer.message`` is the OpenAI form of the content blocks."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.begun = False
        self._blocks: dict[int, Json] = {}  # by index

    @property
    def finished(self) -> bool:
        return bool(self.answer.error or self.answer.finish_reasons)

    def whole(self, body: Json) -> Answer:
        if body.get("type") == "error":
            self.answer.error = error_text(body.get("error"))
            return self.answer
        self._head(body)
        self._blocks = dict(enumerate(body.get("content") or ()))
        self._end(body.get("stop_reason"))
        return self.answer

    def event(self, data: Json) -> None:
        kind = data.get("type")
        if kind == "error":
            self.answer.error = error_text(data.get("error"))
        elif kind == "message_start":
            self._head(data["message"])
        elif kind == "content_block_start":
            self.begun = True
            self._blocks[data["index"]] = dict(data["content_block"])
        elif kind == "content_block_delta":
            self._delta(self._blocks.setdefault(data["index"], {}), data["delta"])
        elif kind == "message_delta":
            self._usage(data.get("usage") or {})
            if reason := (data.get("delta") or {}).get("stop_reason"):
                self._end(reason)
        elif kind == "message_stop" and not self.answer.finish_reasons:
            self._end(None)

    def _head(self, message: Json) -> None:
        self.answer.id, self.answer.model = str(message.get("id") or ""), str(message.get("model") or "")
        self._usage(message.get("usage") or {})

    def _usage(self, usage: Json) -> None:
        self.answer.count(usage.get("input_tokens"), usage.get("output_tokens"))

    def _end(self, reason: str | None) -> None:
        self.answer.finish_reasons = [reason]
        self.answer.message = blocks_to_message([block for _, block in sorted(self._blocks.items())])

    @staticmethod
    def _delta(block: Json, delta: Json) -> None:
        if delta.get("type") == "input_json_delta":
            block.setdefault("partial_json", "")
            add(block, "partial_json", delta.get("partial_json"))
            return
        for name in ("text", "thinking", "signature"):
            add(block, name, delta.get(name))


class ResponsesReader:
    """``/v1/responses``. The last event of a stream holds the whole answer."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.begun = False

    @property
    def finished(self) -> bool:
        return bool(self.answer.error or self.answer.finish_reasons)

    def whole(self, body: Json) -> Answer:
        answer = self.answer
        if body.get("error"):
            answer.error = error_text(body["error"])
        answer.id, answer.model = str(body.get("id") or ""), str(body.get("model") or "")
        usage = body.get("usage") or {}
        answer.count(usage.get("input_tokens"), usage.get("output_tokens"))
        answer.finish_reasons = [body.get("status")]
        answer.message = items_to_message(body.get("output") or ())
        return answer

    def event(self, data: Json) -> None:
        kind = str(data.get("type") or "")
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            self.whole(data["response"])
        elif kind == "error" or data.get("error"):
            self.answer.error = error_text(data.get("error") or data.get("message"))
        elif kind == "response.created":
            self.answer.id = str(data["response"].get("id") or "")
        elif kind.endswith((".delta", ".added")):
            self.begun = True


class UsageReader:
    """Answers with a model and a usage, but without text: embeddings."""

    begun = finished = True

    def __init__(self) -> None:
        self.answer = Answer()

    def whole(self, body: Json) -> Answer:
        self.answer.model = str(body.get("model") or "")
        self.answer.count((body.get("usage") or {}).get("prompt_tokens"), None)
        return self.answer

    def event(self, data: Json) -> None: ...


def error_text(error: Any) -> str:
    """The message of an error in OpenAI's, Anthropic's or vLLM's form."""
    if isinstance(error, dict):
        return str(error.get("message") or error)
    return str(error)


def blocks_to_message(blocks: Sequence[Json]) -> Json:
    """Anthropic's content blocks as an OpenAI message."""
    message: Json = {"role": "assistant", "content": None}
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            message["content"] = (message["content"] or "") + block.get("text", "")
        elif kind == "thinking":
            message["reasoning"] = message.get("reasoning", "") + block.get("thinking", "")
        elif kind == "tool_use":
            message.setdefault("tool_calls", []).append(_tool_call(block))
    return message


def items_to_message(items: Any) -> Json:
    """The output items of a response as an OpenAI message."""
    message: Json = {"role": "assistant", "content": None}
    for item in items:
        kind = item.get("type")
        if kind == "message":
            texts = [part.get("text") or part.get("refusal") or "" for part in item.get("content") or ()]
            message["content"] = (message["content"] or "") + "".join(texts)
        elif kind == "reasoning":
            texts = [part.get("text", "") for part in item.get("summary") or item.get("content") or ()]
            message["reasoning"] = message.get("reasoning", "") + "".join(texts)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments") or ""}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
    return message


def _tool_call(block: Json) -> Json:
    """Anthropic's ``tool_use``, whole or from a stream, as OpenAI's tool call."""
    text = block.get("partial_json")
    if not text:
        text = json.dumps(block.get("input") or {}, ensure_ascii=False)
    return {"id": block.get("id"), "type": "function", "function": {"name": block.get("name"), "arguments": text}}
