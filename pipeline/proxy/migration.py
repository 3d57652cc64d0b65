"""The rest of a stream that has broken off, asked of another replica of a policy. Pure.

It is asked for by the ids of the prompt and of what there is of the answer, at vLLM's ``/v1/completions``, and told in
the form of the stream that it continues. That samples what the first replica would have: only where the tokens so far,
and nothing else, decide what comes next. Any other call has no remainder.
"""

from dataclasses import dataclass
from typing import Final

from millstream.pipeline.protocols.answers import RECENT, ChatReader, Json, Reader
from millstream.pipeline.protocols.endpoints import CHAT, COMPLETIONS, Plan
from millstream.pipeline.protocols.openai import choices_asked

DEFAULT_MAX_TOKENS: Final = 16  # of completions
# Request fields that mean the same for the remainder. A repetition penalty counts prompt and answer alike; the other
# two penalties count the answer alone, and the rest would not know of its beginning.
_SAME: Final = frozenset({
    "model", "user", "priority", "cache_salt", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "logit_bias", "allowed_token_ids", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "stream_interval", "stream", "stream_options",
    "return_token_ids",
})  # fmt: skip
# Those that have made the prompt, whose ids are known; those that the rest has in another form; those without effect.
_DONE: Final = frozenset({
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
    """What is missing of a stream."""

    made: int  # tokens that there are
    dropped: int  # further ones whose text nobody has seen: they are sampled again
    chunks: list[Json]  # of the original stream, to be told at once
    request: Json | None  # None if no token is missing; without ``max_tokens`` see `fitting`
    _head: Json  # of each chunk
    _prompt: int  # tokens
    _said: int  # characters
    _top: int | None  # log-probabilities of other tokens that a chat completion tells; None of a completion

    def fitting(self, context: int) -> Json:
        """The request for as much as fits into a model's context of so many tokens."""
        assert self.request is not None
        return {**self.request, "max_tokens": context - self._prompt - self.made}

    def chunk(self, data: Json) -> Json:
        """A chunk of the rest as one of the original stream."""
        if "error" in data:
            return data
        tell = self._text_choice if self._top is None else self._chat_choice
        told = {**self._head, "choices": [tell(choice) for choice in data.get("choices") or ()]}
        if usage := data.get("usage"):
            told["usage"] = _usage(self._prompt, self.made + usage["completion_tokens"])
        return told

    def _text_choice(self, choice: Json) -> Json:
        told: Json = {name: value for name, value in choice.items() if name != "prompt_token_ids"}
        if logprobs := choice.get("logprobs"):
            offsets = [self._said + offset for offset in logprobs.get("text_offset") or ()]
            told["logprobs"] = {**logprobs, "text_offset": offsets}
        return told

    def _chat_choice(self, choice: Json) -> Json:
        told: Json = {
            name: choice[name] for name in ("index", "finish_reason", "stop_reason", "token_ids") if name in choice
        }
        told["delta"] = {"content": choice.get("text") or ""}
        if logprobs := choice.get("logprobs"):
            others = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
            tokens = zip(logprobs["tokens"], logprobs["token_logprobs"], others, strict=True)
            told["logprobs"] = {"content": [self._chat_logprob(*token) for token in tokens]}
        return told

    def _chat_logprob(self, token: str, logprob: float, others: dict[str, float]) -> Json:
        top = list(others.items())[: len(others) if self._top == -1 else self._top]
        return {**_token(token, logprob), "top_logprobs": [_token(*other) for other in top]}


def can_migrate(plan: Plan) -> bool:
    """Whether another replica could say the rest, were it to break off."""
    request = plan.request
    if plan.path not in (CHAT.path, COMPLETIONS.path) or plan.rechunk or choices_asked(request) != 1:
        return False
    for name in request.keys() - _SAME - _DONE:
        if request[name] is not None and _NEUTRAL.get(name, ...) != request[name]:
            return False
    return all(_only_text(message) for message in request.get("messages") or ())


def remainder_of(plan: Plan, reader: Reader) -> Remainder | None:
    """What is missing of a stream that has begun; None if that can't be said exactly."""
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
    dropped, untold = found
    if dropped and (plan.asked.get("return_token_ids") or plan.asked.get("logprobs") not in (None, False)):
        return None  # the client has seen more of them than their text
    made, limit = len(ids) - dropped, _limit(request, text)
    head: Json = {"object": "text_completion" if text else "chat.completion.chunk", "id": answer.id}
    head |= {"created": answer.created, "model": answer.model}
    chunks: list[Json] = [{**head, "choices": [_piece(untold, None, text)]}] if untold else []
    if not ended and limit is not None and made >= limit:
        chunks.append({**head, "choices": [_piece("", "length", text)]})
        ended = True
    if ended:
        chunks.append({**head, "choices": [], "usage": _usage(len(prompt), made)})
    remainder = None if ended else _request(request, [*prompt, *ids[:made]], made, limit, text)
    top = None if text else request.get("top_logprobs") or 0
    return Remainder(made, dropped, chunks, remainder, head, len(prompt), len(said) + len(untold), top)


def cut(pieces: list[tuple[str, list[str]]], said: str, stops: list[str], held: int) -> tuple[int, str] | None:
    """Where a stream can be continued: how many of its last tokens have to go, and which text of the others is still to
    be told. A piece is the text that came, and those of the tokens that came with it. ``said`` is the text of all
    pieces: what there is but for the last ``held`` characters, which might have become one of ``stops``.

    A token without a text is the beginning of a character, which whoever continues would not complete. Nor would they
    see a stop that begins in what there is. None if what would have to go has been said, or if that is not clear."""
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
    """Where nothing is held back: behind the last token that has brought text."""
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
    """Whether what has been said ends with the beginning of a stop."""
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
        request["seed"] = (seed + made) % 2**63  # the seed's own random numbers have made the beginning
    return request


def _limit(request: Json, text: bool) -> int | None:
    """Tokens of the whole answer; None for what fits."""
    limit: int | None = request.get("max_tokens")
    if text:
        return DEFAULT_MAX_TOKENS if limit is None else limit
    chat: int | None = request.get("max_completion_tokens")
    return limit if chat is None else chat


def _stops(request: Json, *, whole: bool) -> tuple[list[str], int]:
    """What ends an answer, and how many characters vLLM holds back for its sake, unless it has told the ``whole``."""
    stop = request.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    whole = whole or bool(request.get("include_stop_str_in_output"))
    return stops, 0 if whole or not stops else max(map(len, stops)) - 1


def _only_text(message: Json) -> bool:
    """The ids of a prompt don't tell what was in its images."""
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
