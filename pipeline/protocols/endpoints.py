"""What clients may ask for, and how each kind of model server is asked for it. Pure.

A server that speaks the client's protocol is asked in it. Others, and every policy (whose token ids only some
interfaces give), are asked for a chat completion, which is told to the client in its own terms.
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


class Writer(Protocol):
    """Tells the client an answer that came in other terms."""

    def client_id(self, answer_id: str) -> str: ...

    def whole(self, body: Json) -> Json: ...

    def event(self, data: Json) -> bytes: ...

    def end(self) -> bytes: ...

    def error(self, message: str) -> bytes: ...


@dataclass(frozen=True)
class Endpoint:
    """One interface of a client's. ``native``: kinds of servers that have it."""

    path: str
    operation: str  # gen_ai.operation.name
    native: frozenset[str]
    reader: Callable[[Json], Reader]
    messages: Callable[[Json], list[Any]]  # the prompt as OpenAI messages
    error_body: Callable[[str, int], Json] = openai.error_body
    to_chat: Callable[[Json], Json] | None = None
    writer: Callable[[Json], Writer] | None = None  # of chat completions


CHAT: Final = Endpoint(
    "/v1/chat/completions",
    "chat",
    frozenset({"vllm", "openai", "anthropic"}),
    lambda asked: ChatReader(choices_asked(asked)),
    lambda asked: asked.get("messages") or [],
)
COMPLETIONS: Final = Endpoint(
    "/v1/completions",
    "text_completion",
    frozenset({"vllm", "openai"}),
    lambda asked: ChatReader(choices_asked(asked), text=True),
    openai.prompt_messages,
)
RESPONSES: Final = Endpoint(
    "/v1/responses",
    "chat",
    frozenset({"openai"}),
    lambda _asked: ResponsesReader(),
    responses.to_messages,
    to_chat=responses.to_chat,
    writer=responses.ResponsesWriter,
)
MESSAGES: Final = Endpoint(
    "/v1/messages",
    "chat",
    frozenset({"anthropic"}),
    lambda _asked: AnthropicReader(),
    anthropic.to_messages,
    error_body=anthropic.error_body,
    to_chat=anthropic.to_chat,
    writer=anthropic.AnthropicWriter,
)
EMBEDDINGS: Final = Endpoint(
    "/v1/embeddings", "embeddings", frozenset({"vllm", "openai"}), lambda _asked: UsageReader(), lambda _asked: []
)
ENDPOINTS: Final = {endpoint.path: endpoint for endpoint in (CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS)}
MALFORMED: Final = (AttributeError, IndexError, KeyError, TypeError, ValueError)
COUNT_TOKENS: Final = "/v1/messages/count_tokens"


@dataclass(slots=True)
class Plan:
    """How a server is asked, and how its answer is told. Without a ``writer`` the client gets the server's bytes."""

    path: str
    asked: Json  # what the model is asked, in the server's protocol; what the span tells
    request: Json  # the same with what the proxy needs to know
    messages: list[Any]
    reader: Callable[[], Reader]
    writer: Callable[[], Writer] | None
    rechunk: bool = False  # the client wants a stream, the server is asked for a whole answer


def plan(endpoint: Endpoint, asked: Json, kind: str) -> Plan:
    """Raises `BadRequest`."""
    try:
        return _plan(endpoint, asked, kind)
    except MALFORMED as error:  # a list where an object belongs, and the like
        raise BadRequest(f"the request has not the form of {endpoint.path}: {error!r}") from error


def _plan(endpoint: Endpoint, asked: Json, kind: str) -> Plan:
    translated = kind not in endpoint.native
    if translated and endpoint.to_chat is None:
        raise BadRequest(f"the server of model {asked.get('model')!r} has no {endpoint.path}")
    chat = endpoint.to_chat(asked) if translated and endpoint.to_chat is not None else asked
    spoken = CHAT if translated else endpoint
    translate = endpoint.writer
    writer: Callable[[], Writer] | None = None
    if translated and translate is not None:
        writer = lambda: translate(asked)  # noqa: E731
    request, rechunk = chat, False
    if kind == "vllm" and spoken is not EMBEDDINGS:
        # A tool parser swallows pieces of a stream, and the ids of their tokens with them: asked for whole.
        rechunk = bool(asked.get("stream") and chat.get("tools") and chat.get("tool_choice") != "none")
        if rechunk:
            chat = {name: value for name, value in chat.items() if name not in ("stream", "stream_options")}
        request = policy_request(chat, text=spoken is COMPLETIONS)
        writer = writer or (lambda: Stripped(asked))
    elif translated and chat.get("stream"):
        request = {**chat, "stream_options": {"include_usage": True}}
    return Plan(
        path=spoken.path,
        asked=chat,
        request=request,
        messages=_messages(endpoint, asked),
        reader=lambda: spoken.reader(chat),
        writer=writer,
        rechunk=rechunk,
    )


def _messages(endpoint: Endpoint, asked: Json) -> list[Any]:
    try:
        found = endpoint.messages(asked)
    except (BadRequest, *MALFORMED):  # what only its own server understands, if anybody, is recorded as it is
        found = asked.get("messages") or asked.get("input") or []
    return found if isinstance(found, list) else [found]
