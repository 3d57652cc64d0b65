"""A model call as the proxy saw it, as a span. Pure."""

import math
import struct
import time
from dataclasses import dataclass
from random import getrandbits
from typing import Any, Final

import orjson

from millstream.pipeline.protocols.answers import Answer, Json
from millstream.schemas.spans import semconv
from millstream.schemas.spans.text import as_text, utf8
from millstream.schemas.wire.records import Span
from millstream.schemas.wire.versions import Versions, to_text

# Request fields that affect sampling, under OpenTelemetry's names or our own.
_SAMPLING: Final = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "stop": "gen_ai.request.stop_sequences",
    "stop_sequences": "gen_ai.request.stop_sequences",
    "n": "gen_ai.request.choice.count",
    **{
        name: f"millstream.request.{name}"
        for name in ("min_p", "repetition_penalty", "logit_bias", "response_format", "guided_json")
    },
}


@dataclass(slots=True)
class CallFacts:
    """What a span records of a call besides the answer."""

    operation: str
    asked: Json  # as the model was asked, without what the proxy needs to record the call
    messages: list[Any]
    upstream: str
    start: int  # ns since the epoch
    traceparent: str
    first_token: int | None = None  # ns since the epoch
    model_version: str | None = None
    response_versions: Versions = ()  # of the weights that made the answer's tokens, if it is known
    resources_id: str = ""
    stream: bool = False
    cached: bool = False
    aside: str = ""  # what it was for, if it is not the agent's own work
    continued: int = 0  # times that a stream was continued by another replica


def call_span(
    rollout_id: str, attempt_id: str, sequence: int, facts: CallFacts, answer: Answer, response_id: str
) -> Span:
    """``response_id`` is the one that the client sees."""
    asked = facts.asked
    model = utf8(str(asked.get("model") or ""))
    found: dict[str, Any] = {
        semconv.OPERATION: facts.operation,
        semconv.REQUEST_MODEL: model,
        semconv.UPSTREAM: facts.upstream,
        semconv.REQUEST_MESSAGES: facts.messages,
        semconv.RESPONSE_MESSAGE: answer.message or answer.messages,
        semconv.INPUT_TOKENS: answer.prompt_tokens,
        semconv.OUTPUT_TOKENS: answer.completion_tokens,
        semconv.UNTRAINABLE: answer.untrainable,
    }
    for name, value in asked.items():
        if (attribute := _SAMPLING.get(name)) is not None:
            found[attribute] = value
    if tools := asked.get("tools"):
        found[semconv.TOOL_DEFINITIONS] = tools
    if facts.stream:
        found["gen_ai.request.stream"] = True
    if facts.cached:
        found[semconv.CACHED] = True
    if len(facts.response_versions) > 1:
        found[semconv.RESPONSE_VERSIONS] = to_text(facts.response_versions)
    if facts.aside:
        found[semconv.ASIDE] = facts.aside
    if facts.continued:
        found[semconv.CONTINUED] = facts.continued
    if facts.resources_id:
        found[semconv.RESOURCES_ID] = facts.resources_id
    if facts.first_token is not None:
        found["gen_ai.response.time_to_first_chunk"] = f"{(facts.first_token - facts.start) / 1e9:.6f}"
    if response_id:
        found[semconv.RESPONSE_ID] = response_id
    if answer.model:
        found[semconv.RESPONSE_MODEL] = answer.model
    if answer.finish_reasons:
        found[semconv.FINISH_REASONS] = answer.finish_reasons
    if answer.error:
        found[semconv.ERROR_TYPE] = "upstream"
    prompt, response, logprobs = _tokens(answer, found)
    attributes = {name: _text(value) for name, value in found.items() if value is not None}
    trace_id, parent_id = _trace_context(facts.traceparent, attempt_id)
    return Span(
        trace_id=trace_id,
        span_id=f"{getrandbits(64):016x}",
        parent_id=parent_id,
        name=f"{facts.operation} {model}",
        kind=semconv.KIND_OF_OPERATION.get(facts.operation, semconv.SPAN),
        span_kind="Client",
        start=facts.start,
        end=time.time_ns(),
        status="Error" if answer.error else "Ok",
        status_message=utf8(answer.error),
        attributes=attributes,
        resource={"service.name": "millstream-proxy"},
        scope_name="millstream.proxy",
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        source=semconv.SOURCE_PROXY,
        sequence=sequence,
        prompt_token_ids=prompt,
        response_token_ids=response,
        response_logprobs=logprobs,
        model_version=facts.model_version,
    )


def _trace_context(traceparent: str, attempt_id: str) -> tuple[str, str]:
    """Trace id and parent id of a W3C traceparent; without one, a trace of the attempt's own."""
    parts = traceparent.split("-")
    if len(parts) == 4 and len(parts[1]) == 32 and len(parts[2]) == 16:
        return parts[1], parts[2]
    return attempt_id.replace("-", ""), ""


def _tokens(answer: Answer, found: dict[str, Any]) -> tuple[bytes | None, bytes | None, bytes | None]:
    """The prompt's ids, the answer's, and its log-probabilities, as records hold them. What can't be one is left out,
    and ``found`` gets the reason."""
    if answer.message is None:  # several choices, or an answer without text
        return None, None, None
    prompt, ids, logprobs = answer.prompt_token_ids, answer.token_ids, answer.logprobs
    try:
        packed = _packed("i", prompt), _packed("i", ids), _packed("f", logprobs)
        if logprobs is None or math.isfinite(sum(logprobs)):
            return packed
    except (struct.error, OverflowError, TypeError):
        pass
    if not found[semconv.UNTRAINABLE]:
        found[semconv.UNTRAINABLE] = "token ids or log-probabilities are not finite numbers"
    return _valid("i", prompt), _valid("i", ids), None


def _packed(kind: str, values: list[Any] | None) -> bytes | None:
    if values is None:
        return None
    if not isinstance(values, list):
        raise TypeError(f"not a list, but {type(values)}")
    return struct.pack(f"<{len(values)}{kind}", *values)


def _valid(kind: str, values: list[Any] | None) -> bytes | None:
    try:
        return _packed(kind, values)
    except (struct.error, OverflowError, TypeError):
        return None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return utf8(value)
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # half characters, integers beyond 64 bits
        return as_text(value)
