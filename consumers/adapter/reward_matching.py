"""Which call each reward belongs to: strategies, tried in turn. None of them uses a clock."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from millstream.consumers.adapter.calls import Call, SpanTree
from millstream.schemas.config.triplet_rules import TripletRules
from millstream.schemas.spans import dialects, semconv
from millstream.schemas.wire.records import Span
from millstream.schemas.wire.trainable import bad_reward


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward at a position of the trace. Each dimension of a multi-dimensional one is a reward; the first is
    ``primary``."""

    position: int
    name: str
    value: float
    span: Span
    primary: bool = True

    @property
    def link(self) -> str | None:
        """Response id of the call that the agent named for it."""
        return self.span.attributes.get(semconv.REWARD_FOR)


class Candidates:
    """The calls that a reward may go to, with the lookups that strategies need."""

    def __init__(self, calls: Sequence[Call], tree: SpanTree) -> None:
        self.calls = sorted(calls, key=lambda call: call.ended)
        self.tree = tree

    def latest_before(self, position: int) -> Call | None:
        """The last call that had ended."""
        return _before(self.calls, position)

    def latest_of_agent(self, agent: str, position: int) -> Call | None:
        return _before(self._by_agent.get(agent, ()), position)

    def latest_within(self, span_id: str, position: int) -> Call | None:
        """The last call that had ended below this span, or at it."""
        return _before(self._by_span.get(span_id, ()), position)

    def by_response_id(self, response_id: str) -> Call | None:
        return self._by_response_id.get(response_id)

    @cached_property
    def _by_agent(self) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            if call.agent is not None:
                found.setdefault(call.agent, []).append(call)
        return found

    @cached_property
    def _by_span(self) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            for span_id in (call.span.span_id, *self.tree.enclosing(call.span)):
                found.setdefault(span_id, []).append(call)
        return found

    @cached_property
    def _by_response_id(self) -> dict[str, Call]:
        return {call.response_id: call for call in self.calls if call.response_id}


Strategy = Callable[[Reward, Candidates], Call | None]
"""The call that a reward belongs to, or None."""


def nearest(reward: Reward, calls: Candidates) -> Call | None:
    """The latest call that had ended when the reward was emitted."""
    return calls.latest_before(reward.position)


def by_agent(reward: Reward, calls: Candidates) -> Call | None:
    """The latest call of the agent whose work the reward was emitted in."""
    agent = calls.tree.agent(reward.span)
    return None if agent is None else calls.latest_of_agent(agent, reward.position)


def by_span(reward: Reward, calls: Candidates) -> Call | None:
    """The latest call within the smallest span around the reward that has one."""
    within = (calls.latest_within(span_id, reward.position) for span_id in calls.tree.enclosing(reward.span))
    return next((call for call in within if call is not None), None)


def final(_reward: Reward, calls: Candidates) -> Call | None:
    """The attempt's last call, whenever the reward was emitted."""
    return calls.calls[-1] if calls.calls else None


def link(reward: Reward, calls: Candidates) -> Call | None:
    """The call that the agent named (``emit_reward(…, for_call=response_id)``). Such a reward goes there with every
    strategy; with this one, other rewards match no call."""
    return None if reward.link is None else calls.by_response_id(reward.link)


STRATEGIES: Final[Mapping[str, Strategy]] = {
    "nearest": nearest,
    "agent": by_agent,
    "span": by_span,
    "final": final,
    "link": link,
}


def rewards_of(spans: Sequence[Span]) -> list[Reward]:
    found = []
    for position, span in enumerate(spans):
        if span.reward is not None:
            found.append(Reward(position, span.reward_name or "reward", span.reward, span))
            if semconv.AGL_SECOND_REWARD in span.attributes:
                others = dialects.rewards_of(span.attributes)[1:]
                found += [Reward(position, name or "reward", value, span, primary=False) for name, value in others]
    return found


def match(reward: Reward, calls: Candidates, strategies: Sequence[Strategy]) -> tuple[Call | None, str | None]:
    """The reward's call, or None and the reason."""
    if reward.link is not None:
        call = link(reward, calls)
        return call, None if call else f"no call that is trained on has the response id {reward.link!r}"
    for strategy in strategies:
        if (call := strategy(reward, calls)) is not None:
            return call, None
    return None, "no call of its own was found" if calls.calls else "there is no call that is trained on"


def anomaly(reward: Reward, rules: TripletRules) -> str | None:
    """Why the reward's value is unusable, or None."""
    if bad_reward(reward.value):
        return f"reward {reward.name!r} is {reward.value:g}"
    if rules.reward_range is not None:
        low, high = rules.reward_range
        if not low <= reward.value <= high:
            return f"reward {reward.name!r} is {reward.value:g}, outside {low:g} … {high:g}"
    return None


def earned(rewards: Sequence[Reward], rules: TripletRules) -> float | None:
    """A call's rewards weighted, aggregated, scaled and clipped; None without rewards."""
    values = [reward.value * (rules.weights[reward.name] if rules.weights else 1.0) for reward in rewards]
    if not values:
        return None
    total = values[-1] if rules.aggregate == "last" else sum(values)
    if rules.aggregate == "mean":
        total /= len(values)
    total *= rules.scale
    return total if rules.clip is None else min(max(total, rules.clip[0]), rules.clip[1])


def credited(rewards: Sequence[float | None], rules: TripletRules) -> list[float | None]:
    """The credit of each call of an attempt, given what each has earned, in log order.

    ``final``: a call without rewards of its own gets the credit of the last rewarded call. ``discounted``: each gets
    its return, G(t) = r(t) + discount · G(t+1), where no reward is 0 (Sutton and Barto, Reinforcement Learning, 3.9).
    An attempt without any reward stays without.
    """
    given = [reward for reward in rewards if reward is not None]
    if not given or rules.credit == "none":
        return list(rewards)
    if rules.credit == "final":
        return [given[-1] if reward is None else reward for reward in rewards]
    returns: list[float | None] = []
    following = 0.0
    for reward in reversed(rewards):
        following = (reward or 0.0) + rules.discount * following
        returns.append(following)
    return returns[::-1]


def _before(calls: Sequence[Call], position: int) -> Call | None:
    at = bisect_left(calls, position, key=lambda call: call.ended)
    return calls[at - 1] if at else None
