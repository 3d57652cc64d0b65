"""What a rollout did, step by step, and where two rollouts of one task diverge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millstream.consumers.adapter.calls import SpanTree, calls_of
from millstream.pipeline.store.results import Attempt, Rollout, Store
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import normalised
from millstream.schemas.spans.text import token_count
from millstream.schemas.wire import status
from millstream.schemas.wire.records import Span


@dataclass(frozen=True, slots=True)
class Step:
    """A model's answer, a tool's result or a reward. Equal steps have the same ``identity``."""

    kind: str
    name: str
    text: str
    identity: tuple[object, ...]


def steps(spans: Sequence[Span]) -> list[Step]:
    """The steps in log order."""
    return [step_of(span) for span in step_spans(spans)]


def step_spans(spans: Sequence[Span]) -> list[Span]:
    """The spans of model calls, tools and rewards, normalised, in log order. A call that both the proxy and the agent's
    SDK recorded is there once."""
    spans = [normalised(span) for span in spans]
    calls = {id(call.span) for call in calls_of(spans, SpanTree(spans))}
    return [
        span
        for span in spans
        if id(span) in calls or span.kind == semconv.TOOL or (span.reward is not None and span.kind != semconv.LLM)
    ]


def rollout_diff(store: Store, a: Rollout, b: Rollout) -> tuple[list[list[Step]], int]:
    """The steps of both, and how many they have in common before they diverge. Raises `ConfigError` if they are of
    different groups, or one has no attempt yet."""
    if a.group_id != b.group_id:
        raise ConfigError(
            f"{a.rollout_id} is of group {a.group_id}, {b.rollout_id} of {b.group_id}: only rollouts of one group have "
            "the same task"
        )
    walks = [_deciding_steps(store, rollout) for rollout in (a, b)]
    same = next((n for n, (x, y) in enumerate(zip(*walks, strict=False)) if x.identity != y.identity), None)
    return walks, min(map(len, walks)) if same is None else same


def deciding(attempts: Sequence[Attempt]) -> Attempt:
    """The one that succeeded, else the latest; there is one at least."""
    return next((attempt for attempt in attempts if attempt.status == status.SUCCEEDED), attempts[-1])


def _deciding_steps(store: Store, rollout: Rollout) -> list[Step]:
    attempts = store.attempts(rollout.rollout_id)
    if not attempts:
        raise ConfigError(f"rollout {rollout.rollout_id} has not been attempted yet: there is nothing to compare")
    return steps(store.spans(rollout.rollout_id, attempt_id=deciding(attempts).attempt_id))


def children(spans: Sequence[Span]) -> Mapping[str, list[Span]]:
    """Spans by parent id, in the order of their starts; "" has those whose parent isn't among them."""
    known = {span.span_id for span in spans}
    found: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        found.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
    return found


def token_counts(span: Span) -> tuple[int | None, int | None]:
    """Numbers of prompt and response tokens: of the ids if they are known, else as the provider reports them."""
    ids = span.prompt_token_ids, span.response_token_ids
    reported = span.attributes.get(semconv.INPUT_TOKENS), span.attributes.get(semconv.OUTPUT_TOKENS)
    prompt, response = (
        len(tokens) // 4 if tokens is not None else token_count(text)
        for tokens, text in zip(ids, reported, strict=True)
    )
    return prompt, response


def error_of(span: Span) -> str:
    """The error of a failed operation; empty if it didn't fail."""
    kind = span.attributes.get(semconv.ERROR_TYPE, "")
    if span.status != "Error" and not kind:
        return ""
    return span.status_message or kind or "failed"


def step_of(span: Span) -> Step:
    attributes = span.attributes
    name = attributes.get(semconv.TOOL_NAME, span.name)
    if span.kind == semconv.LLM:
        text = error_of(span) or attributes.get(semconv.RESPONSE_MESSAGE, attributes.get(semconv.OUTPUT_MESSAGES, ""))
        # Texts contain ids of tool calls, which differ each time; tokens don't.
        return Step(span.kind, name, text, (span.kind, span.response_token_ids or text))
    if span.kind == semconv.TOOL:
        result = error_of(span) or attributes.get(semconv.TOOL_RESULT, "")
        text = " → ".join(filter(None, (attributes.get(semconv.TOOL_ARGUMENTS, ""), result)))
    else:
        text = f"{span.reward:g}"
    return Step(span.kind, name, text, (span.kind, name, text))
