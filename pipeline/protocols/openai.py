"""OpenAI's chat completions and completions, asked of a policy with the tokens that the proxy records. Pure."""

from collections.abc import Iterator
from typing import Any, Final

from millstream.pipeline.protocols import sse
from millstream.pipeline.protocols.answers import Json

_TOKENS: Final = ("prompt_token_ids", "token_ids")


class BadRequest(Exception):
    """The request can't be fulfilled; the message says why, and what to do."""


def policy_request(asked: Json, *, text: bool = False) -> Json:
    """The request plus the ids and log-probabilities of all tokens, and their number. ``text``: for
    ``/v1/completions``."""
    request = {**asked, "return_token_ids": True}
    if not text:
        request["logprobs"] = True
    elif asked.get("logprobs") is None:
        request["logprobs"] = 0  # of the tokens themselves, without alternatives
    if asked.get("stream"):
        request["stream_options"] = {**(asked.get("stream_options") or {}), "include_usage": True}
    return request


def choices_asked(asked: Json) -> int:
    """How many choices an answer will have. Raises `BadRequest`."""
    count = asked.get("n") or 1
    prompts = asked.get("prompt")
    if not isinstance(count, int):
        raise BadRequest(f"n must be a whole number, not {count!r}")
    several = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    return count * (len(prompts) if several and isinstance(prompts, list) else 1)


def prompt_messages(asked: Json) -> list[Any]:
    """The prompts of ``/v1/completions`` as messages, for the record."""
    prompt = asked.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str) else [prompt]
    return [{"role": "user", "content": each} for each in prompts]


class Stripped:
    """Removes from a policy's answer what the client did not ask for."""

    strict: bool = False

    def __init__(self, asked: Json) -> None:
        self._ids = bool(asked.get("return_token_ids"))
        self._logprobs = asked.get("logprobs") not in (None, False)
        self._usage = bool((asked.get("stream_options") or {}).get("include_usage"))

    def client_id(self, answer_id: str) -> str:
        return answer_id

    def whole(self, body: Json) -> Json:
        if "choices" not in body:  # an error
            return body
        if not self._ids:
            body = {key: value for key, value in body.items() if key != "prompt_token_ids"}
        return {**body, "choices": [self._choice(choice) for choice in body.get("choices") or ()]}

    def event(self, data: Json) -> bytes:
        choices = data.get("choices")
        if not choices and "usage" in data and not self._usage:
            return b""
        data = {key: value for key, value in data.items() if key != "prompt_token_ids" or self._ids}
        if not self._usage:
            data.pop("usage", None)
        data["choices"] = [self._choice(choice) for choice in choices or ()]
        return sse.event(data)

    def end(self) -> bytes:
        return sse.DONE

    def error(self, message: str) -> bytes:
        return sse.event(error_body(message, 500))

    def _choice(self, choice: Json) -> Json:
        if not self._ids:
            choice = {key: value for key, value in choice.items() if key not in _TOKENS}
        elif not self._logprobs:
            choice = dict(choice)
        if not self._logprobs:
            choice["logprobs"] = None
        return choice


def chunks_of(body: Json) -> Iterator[Json]:
    """A whole chat completion as the chunks of an equivalent stream."""
    head: Json = {"object": "chat.completion.chunk"}
    head |= {key: body[key] for key in ("id", "created", "model", "system_fingerprint") if key in body}
    first = {"prompt_token_ids": body["prompt_token_ids"]} if "prompt_token_ids" in body else {}
    for choice in body.get("choices") or ():
        at, message = {"index": choice.get("index", 0)}, choice.get("message") or {}
        opening = {"role": message.get("role", "assistant"), "content": ""}
        yield {**head, **first, "choices": [{**at, "delta": opening, "finish_reason": None}]}
        calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls") or ())]
        said = {k: v for k, v in message.items() if k not in ("role", "tool_calls") and v is not None}
        parts = [part for part in (said, {"tool_calls": calls} if calls else {}) if part]
        for number, delta in enumerate(parts or [{}]):
            tokens = {k: choice[k] for k in ("logprobs", "token_ids") if number == 0 and choice.get(k) is not None}
            yield {**head, "choices": [{**at, "delta": delta, "finish_reason": None, **tokens}]}
        yield {**head, "choices": [{**at, "delta": {}, "finish_reason": choice.get("finish_reason")}]}
    if usage := body.get("usage"):
        yield {**head, "choices": [], "usage": usage}


def error_body(message: str, http_status: int) -> Json:
    kind = "invalid_request_error" if http_status < 500 else "api_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
