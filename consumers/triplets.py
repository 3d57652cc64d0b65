"""Spans → triplets: the pure part of the adapter, which a user's own function may replace."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from millstream.schemas import semconv
from millstream.schemas.records import RolloutTask, Span, Triplet


@dataclass(frozen=True, slots=True)
class Trace:
    """One attempt as the log holds it: its task and its spans *in log order*."""

    task: RolloutTask
    attempt_id: str
    spans: Sequence[Span]


ToTriplets = Callable[[Trace], Sequence[Triplet]]
"""A custom adapter: from a trace to triplets, by turn. It must be deterministic and do no I/O."""


def to_triplets(trace: Trace) -> list[Triplet]:
    """One triplet per LLM call, in log order, each with the sum of the rewards given to it.

    A reward goes to the latest call that had ended when it was given, by log order; no clock is asked. A call ends
    where the agent's own span of it lies, if there is one: that span and the rewards come from one process, in one
    order. Else it ends where the proxy's span lies, which is in the log before the agent sees the answer. A reward
    before the first call belongs to no triplet; it still counts in `total_reward`.
    """
    calls = dict(llm_calls(trace.spans))
    seen_by_agent = {
        span.attributes.get(semconv.RESPONSE_ID): position
        for position, span in enumerate(trace.spans)
        if span.kind == semconv.LLM and span.source == semconv.SOURCE_AGENT
    }
    turn_ended_at = {
        seen_by_agent.get(span.attributes.get(semconv.RESPONSE_ID), position): turn
        for turn, (position, span) in enumerate(calls.items())
    }
    latest: int | None = None
    rewards: dict[int, float] = {}
    for position, span in enumerate(trace.spans):
        latest = turn_ended_at.get(position, latest)
        if span.reward is not None and latest is not None:
            rewards[latest] = rewards.get(latest, 0.0) + span.reward
    return [_triplet(trace, turn, span, rewards.get(turn)) for turn, span in enumerate(calls.values())]


def total_reward(spans: Sequence[Span]) -> float | None:
    """Sum of all rewards an attempt emitted; None if it emitted none."""
    given = [span.reward for span in spans if span.reward is not None]
    return sum(given) if given else None


def trained_version(triplets: Sequence[Triplet]) -> str | None:
    """The model version of the trainable calls; ``mixed`` if they differ."""
    versions = {t.model_version for t in triplets if t.trainable}
    return versions.pop() if len(versions) == 1 else "mixed" if versions else None


def llm_calls(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Each LLM call once, with its place in the log: the SDK's span of a call that went through the proxy is left out,
    the two share the response id."""
    by_proxy = {
        span.attributes.get(semconv.RESPONSE_ID)
        for span in spans
        if span.source == semconv.SOURCE_PROXY and span.kind == semconv.LLM
    }
    for position, span in enumerate(spans):
        if span.kind == semconv.LLM and (
            span.source == semconv.SOURCE_PROXY or span.attributes.get(semconv.RESPONSE_ID) not in by_proxy
        ):
            yield position, span


def _triplet(trace: Trace, turn: int, span: Span, reward: float | None) -> Triplet:
    task = trace.task
    reason = _why_not(span)
    return Triplet(
        rollout_id=task.rollout_id,
        attempt_id=trace.attempt_id,
        group_id=task.group_id,
        experiment_id=task.experiment_id,
        mode=task.mode,
        resources_id=task.resources_id,
        turn=turn,
        span_id=span.span_id,
        prompt=_first(span.attributes, semconv.REQUEST_MESSAGES, semconv.INPUT_MESSAGES),
        response=_first(span.attributes, semconv.RESPONSE_MESSAGE, semconv.OUTPUT_MESSAGES),
        prompt_token_ids=span.prompt_token_ids,
        response_token_ids=span.response_token_ids,
        response_logprobs=span.response_logprobs,
        reward=reward,
        model_version=span.model_version,
        agent_name=span.attributes.get(semconv.AGENT_NAME),
        trainable=reason is None,
        reason=reason,
        metadata=task.metadata,
    )


def _first(attributes: Mapping[str, str], *names: str) -> str:
    return next((attributes[name] for name in names if name in attributes), "[]")


def _why_not(span: Span) -> str | None:
    """Why a call can't be learnt from; None if it can."""
    if span.status == "Error":
        return f"the call failed: {span.status_message}"
    if span.prompt_token_ids is None or span.response_token_ids is None or span.response_logprobs is None:
        return "no token ids or no logprobs"
    if not span.response_token_ids:
        return "empty response"
    tokens, logprobs = len(span.response_token_ids) // 4, len(span.response_logprobs) // 4
    return None if tokens == logprobs else f"{tokens} response tokens, but {logprobs} logprobs"
