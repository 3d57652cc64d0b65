"""Which call a reward goes to, by each strategy; what several make together; what earlier calls get."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from factories import T0, call, reward, span, task
from hypothesis import given
from hypothesis import strategies as st

from millstream.consumers.adapter.reward_matching import STRATEGIES
from millstream.consumers.adapter.triplets import Trace, TripletMaker
from millstream.schemas.config.triplet_rules import TripletRules
from millstream.schemas.spans import semconv

TASK = task()


def explained(spans, **rules):
    return TripletMaker(TripletRules(**rules)).explain(Trace(TASK, "a", spans))


def rewards(spans, **rules):
    return [verdict.reward for verdict in explained(spans, **rules).verdicts]


def named(value, name="reward", **fields):
    return replace(reward(TASK, "a", value), reward_name=name, **fields)


def linked(value, response_id):
    return named(value, attributes={semconv.REWARD_FOR: response_id})


def dimensions(*values, **fields):
    """Agent Lightning's form of one reward with several dimensions, named 0, 1, …"""
    attributes = {}
    for n, value in enumerate(values):
        attributes |= {f"agentlightning.reward.{n}.name": str(n), f"agentlightning.reward.{n}.value": str(value)}
    return named(values[0], "0", attributes=attributes, **fields)


def agent(span_id, name, parent_id=""):
    attributes = {semconv.AGENT_NAME: name}
    return span(TASK, "a", span_id=span_id, parent_id=parent_id, kind=semconv.AGENT, attributes=attributes)


# A planner asks, a writer within it asks and is rewarded, then the planner is. Agents' spans end after their work.
TEAM = [
    call(TASK, "a", "plan", parent_id="planner"),
    call(TASK, "a", "write", parent_id="writer"),
    named(0.25, parent_id="writer"),
    agent("writer", "writer", "planner"),
    named(1.0, parent_id="planner"),
    agent("planner", "planner"),
]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("nearest", [None, 1.25]),
        ("agent", [1.0, 0.25]),
        ("span", [None, 1.25]),  # the writer's call lies within the planner's span, too
        ("final", [None, 1.25]),
        ("link", [None, None]),
    ],
)
def test_a_team_by_each_strategy(strategy, expected):
    assert rewards(TEAM, match=(strategy,)) == expected


def test_by_span_a_reward_stays_within_the_operation_it_was_given_in():
    spans = [
        call(TASK, "a", "1", parent_id="step1"),
        call(TASK, "a", "2", parent_id="step2"),
        named(0.5, parent_id="step1"),
        span(TASK, "a", span_id="step1", parent_id="root"),
        span(TASK, "a", span_id="step2", parent_id="root"),
    ]
    assert rewards(spans, match=("span",)) == [0.5, None]
    assert rewards(spans) == [None, 0.5]


def test_final_takes_rewards_that_came_before_the_call_too():
    spans = [named(1.0), call(TASK, "a", "1"), named(0.5), call(TASK, "a", "2")]
    assert rewards(spans, match=("final",)) == [None, 1.5]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_link_goes_before_every_strategy(strategy):
    spans = [call(TASK, "a", "1"), call(TASK, "a", "2"), call(TASK, "a", "3"), linked(1.0, "2")]
    assert rewards(spans, match=(strategy,)) == [None, 1.0, None]


def test_a_link_to_no_call_is_reported_and_its_reward_left_out():
    found = explained([call(TASK, "a", "1"), linked(1.0, "x")])
    assert found.verdicts[0].reward is None
    assert found.counts()["reward left out: no call that is trained on has the response id 'x'"] == 1


def test_strategies_are_tried_in_turn():
    spans = [*TEAM[:2], named(0.5), *TEAM[2:]]
    assert rewards(spans, match=("agent",)) == [1.0, 0.25]
    assert rewards(spans, match=("agent", "nearest")) == [1.0, 0.75]


def first_call(_reward, calls):
    return calls.calls[0]


def test_a_strategy_of_the_users_own():
    spans = [call(TASK, "a", "1"), call(TASK, "a", "2"), named(1.0)]
    assert rewards(spans, match=(f"{__name__}:first_call",)) == [1.0, None]


def test_several_rewards_make_one():
    spans = [call(TASK, "a", "1"), named(1.0, "right"), named(0.5, "style")]
    assert rewards(spans, aggregate="sum") == [1.5]
    assert rewards(spans, aggregate="mean") == [0.75]
    assert rewards(spans, aggregate="last") == [0.5]
    assert rewards(spans, weights={"right": 2.0, "style": -1.0}) == [1.5]
    found = explained(spans, weights={"right": 2.0})
    assert (found.verdicts[0].reward, [why for _, why in found.left_out]) == (2.0, ["'style' has no weight"])


def test_of_several_dimensions_the_primary_one_counts_unless_they_are_weighed():
    spans = [call(TASK, "a", "1"), dimensions(1.0, 0.25)]
    found = explained(spans)
    assert (found.verdicts[0].reward, [why for _, why in found.left_out]) == (1.0, ["'1' has no weight"])
    assert rewards(spans, weights={"0": 1.0, "1": 4.0}) == [2.0]
    assert rewards(spans, weights={"1": 4.0}) == [1.0]


def test_scaled_then_clipped():
    spans = [call(TASK, "a", "1"), named(30.0), call(TASK, "a", "2"), named(2.0)]
    assert rewards(spans, scale=0.1, clip=(-1.0, 1.0)) == [1.0, 0.2]


def test_credit_to_earlier_calls():
    spans = [call(TASK, "a", "1"), named(0.5), call(TASK, "a", "2"), call(TASK, "a", "3"), named(1.0)]
    assert rewards(spans) == [0.5, None, 1.0]
    assert rewards(spans, credit="final") == [0.5, 1.0, 1.0]
    assert rewards(spans, credit="discounted", discount=0.5) == [0.75, 0.5, 1.0]
    assert rewards(spans[:1], credit="discounted") == [None]


@pytest.mark.parametrize(("value", "why"), [(math.nan, "is nan"), (7.0, "is 7, outside 0 … 1")])
def test_an_anomalous_reward_makes_its_call_useless(value, why):
    found = explained([call(TASK, "a", "1"), named(1.0), named(value)], reward_range=(0.0, 1.0))
    assert found.verdicts[0].reason == f"reward 'reward' {why}"
    assert found.counts() == {
        "calls": 1,
        "used": 0,
        "rewards": 2,
        f"call dropped: reward 'reward' {why}": 1,
        f"reward left out: reward 'reward' {why}": 1,
    }


def test_what_is_not_used_is_counted():
    maker = TripletMaker()
    for _ in range(2):
        maker(Trace(TASK, "a", [named(1.0), call(TASK, "a", "1", status="Error")]))
    assert (maker.calls_dropped, maker.rewards_left_out) == (2, 2)


def test_what_a_judge_said_does_not_take_the_reward():
    judge = call(TASK, "a", "j")
    judge = replace(judge, attributes=judge.attributes | {semconv.RESPONSE_MODEL: "judge-70b"})
    spans = [call(TASK, "a", "1"), judge, named(1.0)]
    assert rewards(spans, exclude_models=("judge-*",)) == [1.0, None]
    assert [v.reason for v in explained(spans, exclude_models=("judge-*",)).verdicts] == [
        None,
        "model 'judge-70b' is excluded",
    ]


names = st.sampled_from(["planner", "writer", "coder"])
clock = st.integers(0, 2**62)
event = st.one_of(
    st.tuples(st.just("call"), names, clock),
    st.tuples(st.just("reward"), names, clock, st.floats(allow_nan=True, width=32)),
    st.tuples(st.just("dimensions"), names, clock, st.floats(-5, 5, width=32)),
    st.tuples(st.just("link"), st.integers(0, 12), clock, st.floats(-5, 5, width=32)),
)


@given(
    st.lists(event, max_size=30),
    st.lists(st.sampled_from(sorted(STRATEGIES)), min_size=1, max_size=3),
    st.sampled_from(["", "planner", "planner|coder"]),
    st.sampled_from([{}, {"1": 0.5}]),
    clock,
)
def test_every_reward_goes_to_one_call_or_is_reported_whatever_the_clocks_say(
    history, strategies, chosen, weights, skew
):
    spans = [agent(name, name) for name in ("planner", "writer", "coder")]
    for number, (what, who, time, *value) in enumerate(history):
        when = {"start": time, "end": time, "span_id": f"{number:016x}"}
        if what == "call":
            spans.append(call(TASK, "a", str(number), parent_id=who, **when))
        elif what == "reward":
            spans.append(named(value[0], parent_id=who, **when))
        elif what == "dimensions":
            spans.append(dimensions(value[0], 1.0, parent_id=who, **when))
        else:
            spans.append(replace(linked(value[0], str(who)), **when))
    rules = {"match": tuple(strategies), "agent_match": chosen, "weights": weights}
    found = explained(spans, **rules)

    given = [(r.span.span_id, r.name) for verdict in found.verdicts for r in verdict.rewards]
    left_out = [(r.span.span_id, r.name) for r, why in found.left_out if why]
    emitted = [(s.span_id, s.reward_name) for s in spans if s.reward is not None]
    emitted += [(s.span_id, "1") for s in spans if semconv.AGL_SECOND_REWARD in s.attributes]
    assert Counter(given + left_out) == Counter(emitted)
    for verdict in found.verdicts:
        assert verdict.selected or not verdict.rewards

    skewed = explained([replace(s, start=(s.start + skew) % T0, end=0) for s in spans], **rules)
    assert [[r.span.span_id for r in v.rewards] for v in skewed.verdicts] == [
        [r.span.span_id for r in v.rewards] for v in found.verdicts
    ]


@given(st.permutations(range(6)))
def test_the_proxys_records_may_come_in_any_order_before_the_agents_own(order):
    """The agent's spans and rewards are in one order; the proxy's of the same calls lie anywhere before them."""

    def by_sdk(number):
        return span(TASK, "a", kind=semconv.LLM, attributes={semconv.RESPONSE_ID: str(number)})

    own = [item for n in range(6) for item in (by_sdk(n), named(float(n)))]
    found = explained([*(call(TASK, "a", str(n)) for n in order), *own])
    assert {v.call.response_id: v.reward for v in found.verdicts} == {str(n): float(n) for n in range(6)}
