"""What clients may ask for, and how each kind of model server is asked for it. Pure.

A server that speaks the client's protocol is asked in it. Other servers, and every policy (whose token ids only some
endpoints give), are asked for a chat completion, which is translated for the client.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

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
    """Translates an answer for the client."""

    def client_id(self, answer_id: str) -> str: ...

    def whole(self, body: Json) -> Json: ...

    def event(self, data: Json) -> bytes: ...

    def end(self) -> bytes: ...

    def error(self, message: str) -> bytes: ...


class Endpoint:
    """One path that clients may ask."""

    path: ClassVar[str]
    operation: ClassVar[str] = "chat"  # gen_ai.operation.name
    native: ClassVar[frozenset[str]]  # kinds of servers that have it
    translated: ClassVar[bool] = False  # whether other servers can be asked for a chat completion instead

    def reader(self, asked: Json) -> Reader:
        """Reads the answer of a server that has this endpoint."""
        raise NotImplementedError

    def messages(self, asked: Json) -> list[Any]:
        """The prompt as OpenAI messages."""
        raise NotImplementedError

    def to_chat(self, asked: Json) -> Json:
        """The chat completion to ask for instead. Raises `BadRequest`."""
        raise NotImplementedError

    def writer(self, asked: Json) -> Writer:
        """Translates that chat completion."""
        raise NotImplementedError

    def error_body(self, message: str, http_status: int) -> Json:
        return openai.error_body(message, http_status)


class Chat(Endpoint):
    path = "/v1/chat/completions"
    native = frozenset({"vllm", "openai", "anthropic"})

    def reader(self, asked: Json) -> Reader:
        return ChatReader(choices_asked(asked))

    def messages(self, asked: Json) -> list[Any]:
        return asked.get("messages") or []


class Completions(Endpoint):
    path = "/v1/completions"
    operation = "text_completion"
    native = frozenset({"vllm", "openai"})

    def reader(self, asked: Json) -> Reader:
        return ChatReader(choices_asked(asked), text=True)

    def messages(self, asked: Json) -> list[Any]:
        return openai.prompt_messages(asked)


class Responses(Endpoint):
    path = "/v1/responses"
    native = frozenset({"openai"})
    translated = True

    def reader(self, asked: Json) -> Reader:
        return ResponsesReader()

    def messages(self, asked: Json) -> list[Any]:
        return responses.to_messages(asked)

    def to_chat(self, asked: Json) -> Json:
        return responses.to_chat(asked)

    def writer(self, asked: Json) -> Writer:
        return responses.ResponsesWriter(asked)


class Messages(Endpoint):
    path = "/v1/messages"
    native = frozenset({"anthropic"})
    translated = True

    def reader(self, asked: Json) -> Reader:
        return AnthropicReader()

    def messages(self, asked: Json) -> list[Any]:
        return anthropic.to_messages(asked)

    def to_chat(self, asked: Json) -> Json:
        return anthropic.to_chat(asked)

    def writer(self, asked: Json) -> Writer:
        return anthropic.AnthropicWriter(asked)

    def error_body(self, message: str, http_status: int) -> Json:
        return anthropic.error_body(message, http_status)


class Embeddings(Endpoint):
    path = "/v1/embeddings"
    operation = "embeddings"
    native = frozenset({"vllm", "openai"})

    def reader(self, asked: Json) -> Reader:
        return UsageReader()

    def messages(self, asked: Json) -> list[Any]:
        return []


CHAT: Final = Chat()
COMPLETIONS: Final = Completions()
EMBEDDINGS: Final = Embeddings()
ENDPOINTS: Final = {each.path: each for each in (CHAT, COMPLETIONS, Responses(), Messages(), EMBEDDINGS)}


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
        if self.served_by is not self.endpoint:
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
    translated = kind not in endpoint.native
    if translated and not endpoint.translated:
        raise BadRequest(f"the server of model {asked.get('model')!r} has no {endpoint.path}")
    chat = endpoint.to_chat(asked) if translated else asked
    served_by = CHAT if translated else endpoint
    policy, rechunk = kind == "vllm" and served_by is not EMBEDDINGS, False
    request = chat
    if policy:
        # A tool parser swallows pieces of a stream and the ids of their tokens, so the answer is asked for whole.
        rechunk = bool(asked.get("stream") and chat.get("tools") and chat.get("tool_choice") != "none")
        if rechunk:
            chat = {name: value for name, value in chat.items() if name not in ("stream", "stream_options")}
        request = policy_request(chat, text=served_by is COMPLETIONS)
    elif translated and chat.get("stream"):
        request = {**chat, "stream_options": {"include_usage": True}}
    return Plan(endpoint, served_by, asked, chat, request, _messages(endpoint, asked), policy, rechunk)


def _messages(endpoint: Endpoint, asked: Json) -> list[Any]:
    try:
        found = endpoint.messages(asked)
    except (BadRequest, *MALFORMED):  # what only its own server understands is recorded as it is
        found = asked.get("messages") or asked.get("input") or []
    return found if isinstance(found, list) else [found]
