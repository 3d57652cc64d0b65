"""What clients may ask for, and how each kind of model server is asked for it. Pure.

A server that speaks the client's protocol is asked in it. Other servers, and every policy (whose token ids only some
endpoints give), are asked for a chat completion, which is translated for the client.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from millstream.pipeline.protocols import anthropic, openai, responses
from millstream.pipeline.protocols.answers import (
    AnthropicReader,
    ChatReader,
    Json,
    Reader,
    ResponsesReader,
    UsageReader,
)
from millstream.pipeline.protocols.openai import BadRequest, Stripped, choices_asked, policy_request

COUNT_TOKENS: Final = "/v1/messages/count_tokens"
MALFORMED: Final = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What code that reads a request or an answer raises if that has another form than its protocol says."""


class Writer(Protocol):
    """Translates an answer for the client. ``strict``: it can't pass on what it does not understand."""

    strict: bool

    def client_id(self, answer_id: str) -> str: ...

    def whole(self, body: Json) -> Json: ...

    def event(self, data: Json) -> bytes: ...

    def end(self) -> bytes: ...

    def error(self, message: str) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One path that clients may ask. ``native`` are the kinds of servers that have it; with ``to_chat`` others can be
    asked for a chat completion instead."""

    path: str
    operation: str = "chat"  # gen_ai.operation.name
    native: frozenset[str]
    reader: Callable[[Json], Reader]  # of a native server's answer
    messages: Callable[[Json], list[Any]]  # the prompt as OpenAI messages
    to_chat: Callable[[Json], Json] | None = None
    writer: Callable[[Json], Writer] | None = None  # translates the chat completion
    error_body: Callable[[str, int], Json] = openai.error_body


CHAT: Final = Endpoint(
    path="/v1/chat/completions",
    native=frozenset({"vllm", "openai", "anthropic"}),
    reader=lambda asked: ChatReader(choices_asked(asked)),
    messages=lambda asked: asked.get("messages") or [],
)
COMPLETIONS: Final = Endpoint(
    path="/v1/completions",
    operation="text_completion",
    native=frozenset({"vllm", "openai"}),
    reader=lambda asked: ChatReader(choices_asked(asked), text=True, echo=bool(asked.get("echo"))),
    messages=openai.prompt_messages,
)
RESPONSES: Final = Endpoint(
    path="/v1/responses",
    native=frozenset({"openai"}),
    reader=lambda _asked: ResponsesReader(),
    messages=responses.to_messages,
    to_chat=responses.to_chat,
    writer=responses.ResponsesWriter,
)
MESSAGES: Final = Endpoint(
    path="/v1/messages",
    native=frozenset({"anthropic"}),
    reader=lambda _asked: AnthropicReader(),
    messages=anthropic.to_messages,
    to_chat=anthropic.to_chat,
    writer=anthropic.AnthropicWriter,
    error_body=anthropic.error_body,
)
EMBEDDINGS: Final = Endpoint(
    path="/v1/embeddings",
    operation="embeddings",
    native=frozenset({"vllm", "openai"}),
    reader=lambda _asked: UsageReader(),
    messages=lambda _asked: [],
)
ENDPOINTS: Final = {each.path: each for each in (CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS)}


@dataclass(slots=True)
class Plan:
    """How one request is put to a server, and how the answer is translated."""

    endpoint: Endpoint  # that the client asks
    served_by: Endpoint  # that the server is asked at
    client_asked: Json
    asked: Json  # the same in the server's protocol; what the span records
    request: Json  # `asked`, and what the proxy needs to know besides
    messages: list[Any]
    policy: bool  # the server is asked for tokens
    rechunk: bool  # the client wants a stream, the server is asked for a whole answer

    @property
    def path(self) -> str:
        return self.served_by.path

    def reader(self) -> Reader:
        return self.served_by.reader(self.asked)

    def writer(self) -> Writer | None:
        """None if the client gets the server's bytes."""
        if self.served_by is not self.endpoint and self.endpoint.writer is not None:
            return self.endpoint.writer(self.client_asked)
        return Stripped(self.client_asked) if self.policy else None


def plan(endpoint: Endpoint, asked: Json, kind: str) -> Plan:
    """``kind`` is that of the server. Raises `BadRequest`."""
    try:
        made = _plan(endpoint, asked, kind)
        made.reader()  # they read the request, too
        made.writer()
    except MALFORMED as error:  # a list where an object belongs, and the like
        raise BadRequest(f"the request does not have the form of {endpoint.path}: {error!r}") from error
    return made


def _plan(endpoint: Endpoint, asked: Json, kind: str) -> Plan:
    served_by, chat = endpoint, asked
    if kind not in endpoint.native:
        if endpoint.to_chat is None:
            raise BadRequest(f"the server of model {asked.get('model')!r} has no {endpoint.path}")
        served_by, chat = CHAT, endpoint.to_chat(asked)
    policy, rechunk = kind == "vllm" and served_by is not EMBEDDINGS, False
    request = chat
    if policy:
        # A tool parser swallows pieces of a stream and the ids of their tokens, so the answer is asked for whole.
        rechunk = bool(asked.get("stream") and chat.get("tools") and chat.get("tool_choice") != "none")
        if rechunk:
            chat = {name: value for name, value in chat.items() if name not in ("stream", "stream_options")}
        request = policy_request(chat, text=served_by is COMPLETIONS)
    elif served_by is not endpoint and chat.get("stream"):
        request = {**chat, "stream_options": {"include_usage": True}}
    return Plan(endpoint, served_by, asked, chat, request, _messages(endpoint, asked), policy, rechunk)


def _messages(endpoint: Endpoint, asked: Json) -> list[Any]:
    try:
        found = endpoint.messages(asked)
    except (BadRequest, *MALFORMED):  # what only its own server understands is recorded as it is
        found = asked.get("messages") or asked.get("input") or []
    return found if isinstance(found, list) else [found]
