"""What an attempt did, step by step, and where two attempts at one task part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millstream.consumers.adapter.calls import SpanTree, calls_of
from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import normalised
from millstream.schemas.wire.records import Span


@dataclass(frozen=True, slots=True)
class Step:
    """A model's answer, a tool's result or a reward. Steps with the same ``identity`` are the same thing done."""

    kind: str
    name: str
    text: str
    identity: tuple[object, ...]


def steps(spans: Sequence[Span]) -> list[Step]:
    """In log order. A call that both the proxy and the agent's SDK recorded is one step."""
    spans = [normalised(span) for span in spans]
    calls = {id(call.span) for call in calls_of(spans, SpanTree(spans))}
    return [
        _step(span)
        for span in spans
        if id(span) in calls or span.kind == semconv.TOOL or (span.reward is not None and span.kind != semconv.LLM)
    ]


def same_steps(a: Sequence[Step], b: Sequence[Step]) -> int:
    """How many steps the two have in common before they part."""
    return next(
        (n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one.identity != other.identity),
        min(len(a), len(b)),
    )


def children(spans: Sequence[Span]) -> Mapping[str, list[Span]]:
    """Spans by parent, in the order of their starts; "" has those whose parent isn't among them."""
    known = {span.span_id for span in spans}
    found: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        found.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
    return found


def token_counts(span: Span) -> tuple[int | None, int | None]:
    """Prompt and response tokens: counted where the ids are known, else as the provider says."""
    ids = span.prompt_token_ids, span.response_token_ids
    told = span.attributes.get(semconv.INPUT_TOKENS), span.attributes.get(semconv.OUTPUT_TOKENS)
    prompt, response = (
        len(tokens) // 4 if tokens is not None else int(text) if text is not None and text.isdigit() else None
        for tokens, text in zip(ids, told, strict=True)
    )
    return prompt, response


def error_of(span: Span) -> str:
    """Empty unless the operation failed."""
    kind = span.attributes.get(semconv.ERROR_TYPE, "")
    if span.status != "Error" and not kind:
        return ""
    return span.status_message or kind or "failed"


def _step(span: Span) -> Step:
    attributes = span.attributes
    name = attributes.get(semconv.TOOL_NAME, span.name)
    if span.kind == semconv.LLM:
        text = error_of(span) or attributes.get(semconv.RESPONSE_MESSAGE, attributes.get(semconv.OUTPUT_MESSAGES, ""))
        # Texts hold ids that differ each time (of tool calls); tokens don't.
        return Step(span.kind, name, text, (span.kind, span.response_token_ids or text))
    if span.kind == semconv.TOOL:
        result = error_of(span) or attributes.get(semconv.TOOL_RESULT, "")
        text = f"{attributes.get(semconv.TOOL_ARGUMENTS, '')} → {result}"
    else:
        text = f"{span.reward:g}"
    return Step(span.kind, name, text, (span.kind, name, text))
