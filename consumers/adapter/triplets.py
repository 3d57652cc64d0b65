"""Spans → triplets: the pure part of the adapter, which a user's own function may replace.

docs/triplets.md has a picture of the steps. Each has a file: `calls` (each call once), `training_rules` (which take
part, which can be trained on), `reward_matching` (what they earn). This module combines them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from millstream.consumers.adapter.calls import Call, SpanTree, calls_of
from millstream.consumers.adapter.reward_matching import (
    STRATEGIES,
    Candidates,
    Reward,
    Strategy,
    anomaly,
    credited,
    earned,
    match,
    rewards_of,
)
from millstream.consumers.adapter.training_rules import Rule, repeats, sampling, selection, validation
from millstream.schemas.config.triplet_rules import TripletRules
from millstream.schemas.import_path import load_object
from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import normalised
from millstream.schemas.spans.text import token_count
from millstream.schemas.wire.records import RolloutTask, Span, Triplet
from millstream.schemas.wire.trainable import TOKEN_BYTES, bad_reward
from millstream.schemas.wire.versions import MIXED


@dataclass(frozen=True, slots=True)
class Trace:
    """One attempt in the log: its task and its spans *in log order*, with the names of `semconv` whichever tracing
    library wrote them."""

    task: RolloutTask
    attempt_id: str
    spans: Sequence[Span]

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", [normalised(span) for span in self.spans])


ToTriplets = Callable[[Trace], Sequence[Triplet]]
"""A custom adapter: from a trace to triplets, by turn. It must be deterministic, without I/O."""


@dataclass(slots=True)
class Verdict:
    """What becomes of a call. ``reason``: why it is not trained on. ``reward``: its credit."""

    call: Call
    selected: bool = True
    reason: str | None = None
    rewards: list[Reward] = field(default_factory=list)
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every call and every reward of a trace, each once. A reward is in one verdict, or ``left_out`` with the
    reason."""

    verdicts: list[Verdict]
    left_out: list[tuple[Reward, str]]

    def counts(self) -> Counter[str]:
        """Calls seen, used, and dropped by reason; rewards seen, and left out by reason."""
        found = Counter(calls=len(self.verdicts), used=sum(v.reason is None for v in self.verdicts))
        found["rewards"] = len(self.left_out) + sum(len(v.rewards) for v in self.verdicts)
        found.update(f"call dropped: {v.reason}" for v in self.verdicts if v.reason is not None)
        found.update(f"reward left out: {why}" for _, why in self.left_out)
        return found


class TripletMaker:
    """The adapter's own function from traces to triplets: one for each LLM call, in log order.

    A ``module:attribute`` in ``rules`` is imported from the current folder. Raises `ConfigError` if that fails.
    ``calls_dropped`` and ``rewards_left_out`` count what it has not used so far.
    """

    def __init__(self, rules: TripletRules | None = None) -> None:
        self.rules = rules = rules or TripletRules()
        self.calls_dropped = self.rewards_left_out = 0
        folder = str(Path.cwd())
        own: list[Rule] = [load_object("rule", path, folder) for path in rules.rules]
        self._selection = selection(rules)
        self._validation = validation(rules, own)
        self._strategies: list[Strategy] = [
            STRATEGIES[name] if name in STRATEGIES else load_object("strategy", name, folder) for name in rules.match
        ]

    def __call__(self, trace: Trace) -> list[Triplet]:
        explanation = self.explain(trace)
        triplets = [_triplet(trace, verdict) for verdict in explanation.verdicts]
        self.calls_dropped += sum(not triplet.trainable for triplet in triplets)
        self.rewards_left_out += len(explanation.left_out)
        return triplets

    def explain(self, trace: Trace) -> Explanation:
        """What becomes of each call and each reward, and why.

        A reward goes to a call that takes part, trained on or not: what an empty answer earned is not its
        predecessor's. An unusable reward makes its call unusable: what it earned is unknown.
        """
        rules, tree = self.rules, SpanTree(trace.spans)
        repeated = repeats(rules)
        validation = self._validation
        if rules.require_tokens and trace.task.mode == "train":
            validation = [*validation, sampling]
        verdicts = [Verdict(call) for call in calls_of(trace.spans, tree)]
        for verdict in verdicts:
            verdict.reason = _first(self._selection, verdict.call)
            verdict.selected = verdict.reason is None
            if verdict.selected:
                verdict.reason = _first(validation, verdict.call) or repeated(verdict.call)
        chosen = [verdict for verdict in verdicts if verdict.selected]
        left_out = self._give(rewards_of(trace.spans), Candidates([v.call for v in chosen], tree), verdicts)
        credit = credited([earned(verdict.rewards, rules) for verdict in chosen], rules)
        for verdict, reward in zip(chosen, credit, strict=True):
            if reward is not None and bad_reward(reward):  # a sum of rewards, or a weight
                verdict.reason = verdict.reason or f"it has earned {reward:g}"
                continue
            verdict.reward = reward
        return Explanation(verdicts, left_out)

    def _give(self, rewards: list[Reward], calls: Candidates, verdicts: list[Verdict]) -> list[tuple[Reward, str]]:
        left_out = []
        for reward in rewards:
            weights = self.rules.weights
            if reward.name not in weights if weights else not reward.primary:
                left_out.append((reward, f"{reward.name!r} has no weight"))
                continue
            call, why = match(reward, calls, self._strategies)
            wrong = anomaly(reward, self.rules)
            if call is not None and wrong is None:
                verdicts[call.turn].rewards.append(reward)
                continue
            left_out.append((reward, wrong or why or ""))
            if call is not None:
                verdicts[call.turn].reason = verdicts[call.turn].reason or wrong
        return left_out


_default = TripletMaker()


def to_triplets(trace: Trace) -> list[Triplet]:
    """One triplet for each LLM call, in log order, by the default rules. ``TripletMaker(settings.triplets)`` has the
    deployment's rules."""
    return _default(trace)


def total_reward(spans: Sequence[Span]) -> float | None:
    """Sum of an attempt's rewards that can be trained on; None without any."""
    given = [span.reward for span in spans if span.reward is not None and not bad_reward(span.reward)]
    return sum(given) if given else None


def total_tokens(triplets: Sequence[Triplet], spans: Sequence[Span]) -> tuple[int, int]:
    """Tokens of all prompts and of all answers of triplets with whole prompts. Calls without token ids count as their
    spans say that the model's server has counted."""
    prompts = answers = 0
    uncounted: set[str] = set()
    for triplet in triplets:
        if triplet.response_token_ids:
            prompts += len(triplet.prompt_token_ids or b"") // TOKEN_BYTES
            answers += len(triplet.response_token_ids) // TOKEN_BYTES
        else:
            uncounted.add(triplet.span_id)
    for span_id in uncounted:
        calls = [span.attributes for span in spans if span.span_id == span_id and span.kind == semconv.LLM]
        prompts += max((token_count(call.get(semconv.INPUT_TOKENS)) or 0 for call in calls), default=0)
        answers += max((token_count(call.get(semconv.OUTPUT_TOKENS)) or 0 for call in calls), default=0)
    return prompts, answers


def trained_version(triplets: Sequence[Triplet]) -> str | None:
    """The model version of the trainable calls, `MIXED` if they differ."""
    versions = {t.model_version for t in triplets if t.trainable}
    return versions.pop() if len(versions) == 1 else MIXED if versions else None


def _first(rules: Sequence[Rule], call: Call) -> str | None:
    for rule in rules:
        if (reason := rule(call)) is not None:
            return reason
    return None


def _triplet(trace: Trace, verdict: Verdict) -> Triplet:
    task, call = trace.task, verdict.call
    span = call.span
    return Triplet(
        rollout_id=task.rollout_id,
        attempt_id=trace.attempt_id,
        group_id=task.group_id,
        experiment_id=task.experiment_id,
        mode=task.mode,
        resources_id=task.resources_id,
        turn=call.turn,
        span_id=span.span_id,
        prompt=call.prompt,
        response=call.response,
        prompt_token_ids=span.prompt_token_ids,
        response_token_ids=span.response_token_ids,
        response_logprobs=span.response_logprobs,
        reward=verdict.reward,
        model_version=span.model_version,
        agent_name=call.agent,
        trainable=verdict.reason is None,
        reason=verdict.reason,
        metadata=task.metadata,
        tools=span.attributes.get(semconv.TOOL_DEFINITIONS),
        response_versions=span.attributes.get(semconv.RESPONSE_VERSIONS),
    )
