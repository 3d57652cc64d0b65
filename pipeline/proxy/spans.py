"""A model call as the proxy saw it, as a span. Pure."""

import struct
import time
from dataclasses import dataclass
from random import getrandbits
from typing import Any, Final

import orjson

from millstream.pipeline.protocols.answers import Answer, Json
from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span

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
    asked: Json  # as the model was asked, without what the proxy added
    messages: list[Any]
    upstream: str
    start: int  # ns since the epoch
    traceparent: str
    first_token: int | None = None  # ns since the epoch
    model_version: str | None = None
    resources_id: str = ""
    stream: bool = False
    cached: bool = False
    continued: int = 0  # times that a stream was continued by another replica


def call_span(
    rollout_id: str, attempt_id: str, sequence: int, facts: CallFacts, answer: Answer, response_id: str
) -> Span:
    """``response_id`` is the one that the client sees."""
    asked = facts.asked
    model = str(asked.get("model") or "")
    first_token_s = None if facts.first_token is None else f"{(facts.first_token - facts.start) / 1e9:.6f}"
    found = {attribute: asked[name] for name, attribute in _SAMPLING.items() if asked.get(name) is not None} | {
        semconv.OPERATION: facts.operation,
        semconv.REQUEST_MODEL: model,
        semconv.UPSTREAM: facts.upstream,
        semconv.REQUEST_MESSAGES: facts.messages,
        semconv.TOOL_DEFINITIONS: asked.get("tools") or None,
        "gen_ai.request.stream": facts.stream or None,
        semconv.CACHED: facts.cached or None,
        semconv.CONTINUED: facts.continued or None,
        semconv.RESOURCES_ID: facts.resources_id or None,
        "gen_ai.response.time_to_first_chunk": first_token_s,
        semconv.RESPONSE_ID: response_id or None,
        semconv.RESPONSE_MODEL: answer.model or None,
        semconv.RESPONSE_MESSAGE: answer.message,
        semconv.FINISH_REASONS: answer.finish_reasons or None,
        semconv.INPUT_TOKENS: answer.prompt_tokens,
        semconv.OUTPUT_TOKENS: answer.completion_tokens,
        semconv.ERROR_TYPE: "upstream" if answer.error else None,
        semconv.UNTRAINABLE: answer.mismatch,
    }
    attributes = {
        name: value if isinstance(value, str) else _json(value) for name, value in found.items() if value is not None
    }
    one = answer.message is not None
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
        status_message=answer.error,
        attributes=attributes,
        resource={"service.name": "millstream-proxy"},
        scope_name="millstream.proxy",
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        source=semconv.SOURCE_PROXY,
        sequence=sequence,
        prompt_token_ids=_int32(answer.prompt_token_ids) if one else None,
        response_token_ids=_int32(answer.token_ids),
        response_logprobs=_float32(answer.logprobs),
        model_version=facts.model_version,
    )


def _trace_context(traceparent: str, attempt_id: str) -> tuple[str, str]:
    """Trace id and parent id of a W3C traceparent; without one, a trace of the attempt's own."""
    parts = traceparent.split("-")
    if len(parts) == 4 and len(parts[1]) == 32 and len(parts[2]) == 16:
        return parts[1], parts[2]
    return attempt_id.replace("-", ""), ""


def _int32(ids: list[int] | None) -> bytes | None:
    return None if ids is None else struct.pack(f"<{len(ids)}i", *ids)


def _float32(values: list[float] | None) -> bytes | None:
    return None if values is None else struct.pack(f"<{len(values)}f", *values)


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
