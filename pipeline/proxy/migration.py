"""The remainder of a broken stream, asked of another replica of a policy. Pure.

The request goes to vLLM's ``/v1/completions``, with the ids of the prompt and of the answer so far; what comes is
translated to the form of the broken stream. This samples what the first replica would have sampled only if the tokens
so far, and nothing else, decide what comes next. Any other call has no remainder.
"""

from dataclasses import dataclass
from typing import Final

from millstream.pipeline.protocols.answers import RECENT, ChatReader, Json, Reader
from millstream.pipeline.protocols.endpoints import CHAT, COMPLETIONS, Plan
from millstream.pipeline.protocols.openai import choices_asked

DEFAULT_MAX_TOKENS: Final = 16  # of completions
# Request fields that mean the same for the remainder. A repetition penalty counts prompt and answer alike. The other
# two penalties count the answer alone, and the remainder would not include its beginning.
_SAME: Final = frozenset({
    "model", "user", "priority", "cache_salt", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "logit_bias", "allowed_token_ids", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "stream_interval", "stream", "stream_options",
    "return_token_ids",
})  # fmt: skip
# Fields that made the prompt, whose ids are known; that the remainder has in another form; that have no effect.
_REPLACED: Final = frozenset({
    "messages", "prompt", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "documents",
    "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "max_tokens", "max_completion_tokens",
    "min_tokens", "seed", "logprobs", "top_logprobs", "request_id", "session_id", "metadata", "store",
    "service_tier",
})  # fmt: skip
_NEUTRAL: Final[Json] = {
    "n": 1,
    "echo": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "bad_words": [],
    "use_beam_search": False,
    "response_format": {"type": "text"},
}


@dataclass(frozen=True, slots=True)
class Remainder:
    """What is missing from a stream."""

    made: int  # tokens that have come and count
    dropped: int  # further ones whose text the client has not got: they are sampled again
    chunks: list[Json]  # in the form of the broken stream, for the client now
    request: Json | None  # None if no token is missing; if it has no ``max_tokens``, see `fitting`
    _head: Json  # of each chunk
    _prompt: int  # tokens
    _length: int  # characters of the answer so far
    _top: int | None  # alternatives per token that a chat completion shows; None for a completion

    def fitting(self, context: int) -> Json:
        """The request for as many tokens as fit into a model's context."""
        assert self.request is not None
        return {**self.request, "max_tokens": context - self._prompt - self.made}

    def chunk(self, data: Json) -> Json:
        """A chunk of the remainder in the form of the broken stream."""
        if "error" in data:
            return data
        translate = self._text_choice if self._top is None else self._chat_choice
        chunk = {**self._head, "choices": [translate(choice) for choice in data.get("choices") or ()]}
        if usage := data.get("usage"):
            chunk["usage"] = _usage(self._prompt, self.made + usage["completion_tokens"])
        return chunk

    def _text_choice(self, choice: Json) -> Json:
        translated: Json = {name: value for name, value in choice.items() if name != "prompt_token_ids"}
        if logprobs := choice.get("logprobs"):
            offsets = [self._length + offset for offset in logprobs.get("text_offset") or ()]
            translated["logprobs"] = {**logprobs, "text_offset": offsets}
        return translated

    def _chat_choice(self, choice: Json) -> Json:
        translated: Json = {
            name: choice[name] for name in ("index", "finish_reason", "stop_reason", "token_ids") if name in choice
        }
        translated["delta"] = {"content": choice.get("text") or ""}
        if logprobs := choice.get("logprobs"):
            others = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
            tokens = zip(logprobs["tokens"], logprobs["token_logprobs"], others, strict=True)
            translated["logprobs"] = {"content": [self._chat_logprob(*token) for token in tokens]}
        return translated

    def _chat_logprob(self, token: str, logprob: float, others: dict[str, float]) -> Json:
        top = list(others.items())[: len(others) if self._top == -1 else self._top]
        return {**_token(token, logprob), "top_logprobs": [_token(*other) for other in top]}


def can_migrate(plan: Plan) -> bool:
    """Whether another replica could continue the stream if it broke."""
    request = plan.request
    if plan.path not in (CHAT.path, COMPLETIONS.path) or plan.rechunk or choices_asked(request) != 1:
        return False
    for name in request.keys() - _SAME - _REPLACED:
        if request[name] is not None and _NEUTRAL.get(name, ...) != request[name]:
            return False
    return all(_only_text(message) for message in request.get("messages") or ())


def remainder_of(plan: Plan, reader: Reader) -> Remainder | None:
    """What is missing from a stream that has begun; None if it can't be continued exactly."""
    if not isinstance(reader, ChatReader) or not can_migrate(plan):
        return None
    answer, request, text = reader.answer, plan.request, plan.path == COMPLETIONS.path
    message, prompt, ids = answer.message or {}, answer.prompt_token_ids, answer.token_ids
    if not prompt or not ids or len(ids) != len(answer.logprobs or ()):
        return None
    if any(value for name, value in message.items() if name not in ("role", "content")):
        return None
    said = message.get("content") or ""
    ended = answer.finish_reasons != [None] and not answer.aborted
    found = (0, "") if ended else cut(reader.recent(), said, *_stops(request, whole=answer.aborted))
    if found is None:
        return None
    dropped, unsent = found
    if dropped and (plan.asked.get("return_token_ids") or plan.asked.get("logprobs") not in (None, False)):
        return None  # the client has more of them than their text
    made, limit = len(ids) - dropped, _limit(request, text)
    head: Json = {"object": "text_completion" if text else "chat.completion.chunk", "id": answer.id}
    head |= {"created": answer.created, "model": answer.model}
    chunks: list[Json] = [{**head, "choices": [_piece(unsent, None, text)]}] if unsent else []
    if not ended and limit is not None and made >= limit:
        chunks.append({**head, "choices": [_piece("", "length", text)]})
        ended = True
    if ended:
        chunks.append({**head, "choices": [], "usage": _usage(len(prompt), made)})
    remainder = None if ended else _request(request, [*prompt, *ids[:made]], made, limit, text)
    top = None if text else request.get("top_logprobs") or 0
    return Remainder(made, dropped, chunks, remainder, head, len(prompt), len(said) + len(unsent), top)


def cut(pieces: list[tuple[str, list[str]]], said: str, stops: list[str], held: int) -> tuple[int, str] | None:
    """Where a stream can be continued: how many of its last tokens have to be dropped, and which text of the others is
    still to be sent. A piece is the text that came, and the texts of the tokens that came with it. ``said`` is the text
    of all pieces: all but the last ``held`` characters, which might have become one of ``stops``.

    A token without text is the beginning of a character, which another server would not complete. Nor would it see a
    stop that begins in the text so far. None if text to be dropped has been sent, or if that is not clear."""
    texts = [text for _, tokens in pieces for text in tokens]
    if not held:
        return _cut_behind_text(pieces, said, stops)
    whole = "".join(texts)
    seen = max(0, len(whole) - held)
    if len(pieces) < RECENT:
        clear = "".join(text for text, _ in pieces) == whole[:seen]
    else:
        clear = seen > 0 and said.endswith(whole[:seen])
    for dropped in range(len(texts) + 1 if clear else 0):
        kept = texts[: len(texts) - dropped]
        text = "".join(kept)
        if len(text) < seen:
            return None
        if (not kept or kept[-1]) and not _begins(said + text[seen:], stops):
            return dropped, text[seen:]
    return None


def _cut_behind_text(pieces: list[tuple[str, list[str]]], said: str, stops: list[str]) -> tuple[int, str] | None:
    """Where nothing is held back: behind the last token that brought text."""
    dropped = 0
    for text, tokens in reversed(pieces):
        if text:
            last = next((n for n in range(len(tokens), 1, -1) if tokens[n - 1]), 1)
            if len(tokens) > 1 and not text.endswith(tokens[last - 1]):
                return None
            dropped += len(tokens) - last
            break
        dropped += len(tokens)
    else:
        if len(pieces) == RECENT:
            return None
    return None if _begins(said, stops) else (dropped, "")


def _begins(said: str, stops: list[str]) -> bool:
    """Whether the text ends with the beginning of a stop."""
    return any(said.endswith(stop[:n]) for stop in stops for n in range(1, len(stop)))


def _request(asked: Json, prompt: list[int], made: int, limit: int | None, text: bool) -> Json:
    request = {name: asked[name] for name in asked.keys() & _SAME}
    request["prompt"] = prompt
    request["logprobs"] = asked["logprobs"] if text else asked.get("top_logprobs") or 0
    if limit is not None:
        request["max_tokens"] = limit - made
    if least := asked.get("min_tokens"):
        request["min_tokens"] = max(0, least - made)
    if (seed := asked.get("seed")) is not None:
        request["seed"] = (seed + made) % 2**63  # another sequence than the one that sampled the beginning
    return request


def _limit(request: Json, text: bool) -> int | None:
    """Tokens of the whole answer; None: as many as fit."""
    limit: int | None = request.get("max_tokens")
    if text:
        return DEFAULT_MAX_TOKENS if limit is None else limit
    chat: int | None = request.get("max_completion_tokens")
    return limit if chat is None else chat


def _stops(request: Json, *, whole: bool) -> tuple[list[str], int]:
    """The strings that end an answer, and how many characters vLLM holds back because of them, unless it has sent the
    ``whole``."""
    stop = request.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    whole = whole or bool(request.get("include_stop_str_in_output"))
    return stops, 0 if whole or not stops else max(map(len, stops)) - 1


def _only_text(message: Json) -> bool:
    """The ids of a prompt do not include its images."""
    content = message.get("content")
    return not isinstance(content, list) or all(
        isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text") for part in content
    )


def _piece(piece: str, finish_reason: str | None, text: bool) -> Json:
    form = {"text": piece} if text else {"delta": {"content": piece}}
    return {"index": 0, **form, "finish_reason": finish_reason, "logprobs": None}


def _token(token: str, logprob: float) -> Json:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
