"""Spans → triplets: which call a reward goes to, and what may be learnt from."""

import re
from dataclasses import replace

import pytest
from factories import call, reward, span, task
from hypothesis import given
from hypothesis import strategies as st

from millstream.consumers.adapter.triplets import (
    Trace,
    TripletMaker,
    to_triplets,
    total_reward,
    total_tokens,
    trained_version,
)
from millstream.schemas.config.settings import load_settings
from millstream.schemas.config.triplet_rules import TripletRules
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans import semconv

TASK = task(metadata={"topic": "sums"}, resources_id="r1")


def test_each_reward_goes_to_the_call_before_it():
    spans = [call(TASK, "a", "1"), reward(TASK, "a", 0.5), call(TASK, "a", "2"), reward(TASK, "a", 0.25)]
    first, second = to_triplets(Trace(TASK, "a", spans))
    assert (first.turn, first.reward, second.turn, second.reward) == (0, 0.5, 1, 0.25)
    assert first.prompt == '[{"role": "user", "content": "hi"}]'
    assert first.response_token_ids == b"\x07\x00\x00\x00"
    assert (first.metadata, first.resources_id, first.trainable) == ({"topic": "sums"}, "r1", True)


def test_log_order_counts_not_the_clock():
    late_clock = replace(call(TASK, "a", "1"), start=10**19 // 2, end=10**19 // 2)
    first, second = to_triplets(Trace(TASK, "a", [late_clock, reward(TASK, "a", 1.0), call(TASK, "a", "2")]))
    assert (first.reward, second.reward) == (1.0, None)


def test_a_reward_overtaken_by_the_next_calls_record_stays_with_its_own():
    """The proxy writes the second call while the agent's first reward is still on its way through the runner."""

    def by_sdk(response_id):
        return span(TASK, "a", kind=semconv.LLM, attributes={semconv.RESPONSE_ID: response_id})

    spans = [
        call(TASK, "a", "1"),
        call(TASK, "a", "2"),
        by_sdk("1"),
        reward(TASK, "a", 0.5),
        by_sdk("2"),
        reward(TASK, "a", 0.25),
    ]
    assert [t.reward for t in to_triplets(Trace(TASK, "a", spans))] == [0.5, 0.25]


def test_several_rewards_of_one_call_add_up():
    spans = [call(TASK, "a", "1"), reward(TASK, "a", 0.5), reward(TASK, "a", -0.25)]
    assert [t.reward for t in to_triplets(Trace(TASK, "a", spans))] == [0.25]


def test_a_reward_before_any_call_counts_in_the_total_alone():
    spans = [reward(TASK, "a", 2.0), call(TASK, "a", "1")]
    assert [t.reward for t in to_triplets(Trace(TASK, "a", spans))] == [None]
    assert total_reward(spans) == 2.0
    assert total_reward(spans[1:]) is None


def test_the_sdks_span_of_a_call_through_the_proxy_is_not_a_second_call():
    by_sdk = span(TASK, "a", kind=semconv.LLM, attributes={semconv.RESPONSE_ID: "1"})
    elsewhere = span(TASK, "a", kind=semconv.LLM, attributes={semconv.RESPONSE_ID: "x"})
    triplets = to_triplets(Trace(TASK, "a", [call(TASK, "a", "1"), by_sdk, elsewhere]))
    assert [(t.trainable, t.reason) for t in triplets] == [(True, None), (False, "no token ids or no logprobs")]


def test_calls_that_cannot_be_learnt_from_say_why():
    spans = [
        call(TASK, "a", "1", status="Error", status_message="502"),
        call(TASK, "a", "2", response_token_ids=b"", response_logprobs=b""),
        call(TASK, "a", "3", response_logprobs=b"\0" * 8),
    ]
    assert [t.reason for t in to_triplets(Trace(TASK, "a", spans))] == [
        "the call failed: 502",
        "empty response",
        "1 response tokens, but 2 logprobs",
    ]


def test_tokens_are_counted_or_taken_from_the_server():
    t = task()
    none = {"prompt_token_ids": None, "response_token_ids": None, "response_logprobs": None}
    usage = [
        {semconv.INPUT_TOKENS: "12", semconv.OUTPUT_TOKENS: "5"},
        {semconv.INPUT_TOKENS: "many", semconv.OUTPUT_TOKENS: "9" * 19},
        {semconv.INPUT_TOKENS: "-1", semconv.OUTPUT_TOKENS: "٣"},
    ]
    spans = [call(t, "a", "1", attributes=usage[0])]
    assert total_tokens(to_triplets(Trace(t, "a", spans)), spans) == (3, 1)
    spans += [call(t, "a", str(n), attributes=said, **none) for n, said in enumerate(usage, 2)]
    assert total_tokens(to_triplets(Trace(t, "a", spans)), spans) == (3 + 12, 1 + 5 + (1 << 32) - 1)


def test_versions_that_differ_are_mixed():
    spans = [call(TASK, "a", "1", model_version="r.0.1"), call(TASK, "a", "2", model_version="r.0.2")]
    triplets = to_triplets(Trace(TASK, "a", spans))
    assert trained_version(triplets) == "mixed"
    assert trained_version(triplets[:1]) == "r.0.1"
    assert trained_version([]) is None


def test_the_versions_of_an_answers_tokens_are_carried_over():
    attributes = call(TASK, "a", "1").attributes | {semconv.RESPONSE_VERSIONS: '[[0,"r.0.1"],[1,"r.0.2"]]'}
    mixed = call(TASK, "a", "1", model_version="mixed", attributes=attributes)
    (first, second) = to_triplets(Trace(TASK, "a", [mixed, call(TASK, "a", "2")]))
    assert (first.trainable, first.model_version) == (True, "mixed")
    assert first.response_versions == '[[0,"r.0.1"],[1,"r.0.2"]]'
    assert (second.model_version, second.response_versions) == ("run.0.1", None)


@given(st.lists(st.one_of(st.just("call"), st.floats(-10, 10)), max_size=40))
def test_every_reward_is_given_once_or_stands_before_the_first_call(history):
    spans = [call(TASK, "a", str(i)) if item == "call" else reward(TASK, "a", item) for i, item in enumerate(history)]
    triplets = to_triplets(Trace(TASK, "a", spans))
    first = history.index("call") if "call" in history else len(history)
    unmatched = sum(item for item in history[:first])
    given_away = sum(t.reward or 0.0 for t in triplets)
    assert len(triplets) == history.count("call")
    assert abs(given_away + unmatched - (total_reward(spans) or 0.0)) < 1e-9


def reasons(spans, **rules):
    return [t.reason for t in TripletMaker(TripletRules(**rules))(Trace(TASK, "a", spans))]


def test_only_the_selected_agents_calls_train():
    within = span(TASK, "a", span_id="loop", parent_id="team")
    spans = [
        span(TASK, "a", span_id="team", kind=semconv.AGENT, attributes={semconv.AGENT_NAME: "coder_1"}),
        within,
        call(TASK, "a", "1", parent_id="loop"),
        call(TASK, "a", "2"),
    ]
    assert reasons(spans, agent_match="coder_.*") == [None, "agent None is not selected"]
    assert [t.agent_name for t in to_triplets(Trace(TASK, "a", spans))] == ["coder_1", None]


def test_limits_are_said():
    cut = call(TASK, "a", "2")
    cut = replace(cut, attributes=cut.attributes | {semconv.FINISH_REASONS: '["abort"]'})
    spans = [call(TASK, "a", "1"), cut]
    assert reasons(spans) == [None, "the response was cut off: abort"]
    assert reasons(spans[:1], max_tokens=3) == ["4 tokens, 3 are allowed"]
    assert reasons([call(TASK, "a", str(n)) for n in range(3)], max_repeats=2) == [
        None,
        None,
        "the same response came 3 times",
    ]


@pytest.mark.parametrize(
    ("name", "value", "trained"),
    [
        ("gen_ai.request.temperature", "1", True),
        ("gen_ai.request.temperature", "1.0", True),
        ("gen_ai.request.temperature", "0.7", False),
        ("gen_ai.request.temperature", "0", False),
        ("gen_ai.request.temperature", "warm", False),
        ("gen_ai.request.top_p", "1", True),
        ("gen_ai.request.top_p", "0.95", False),
        ("gen_ai.request.top_k", "-1", True),
        ("gen_ai.request.top_k", "0", True),
        ("gen_ai.request.top_k", "20", False),
        ("gen_ai.request.frequency_penalty", "0.0", True),
        ("gen_ai.request.frequency_penalty", "0.5", False),
        ("gen_ai.request.presence_penalty", "0", True),
        ("gen_ai.request.presence_penalty", "-0.5", False),
        ("millstream.request.min_p", "0", True),
        ("millstream.request.min_p", "0.05", False),
        ("millstream.request.repetition_penalty", "1.0", True),
        ("millstream.request.repetition_penalty", "1.1", False),
        ("millstream.request.logit_bias", "{}", True),
        ("millstream.request.logit_bias", '{"7": 1}', False),
        ("gen_ai.request.seed", "7", True),
        ("gen_ai.request.max_tokens", "16", True),
    ],
)
def test_tokens_of_another_distribution_than_their_logprobs_are_not_trained_on(name, value, trained):
    """Servers return the model's own log-probabilities, before temperature and truncation."""
    made = call(TASK, "a", "1")
    made = replace(made, attributes=made.attributes | {name: value})
    field = name.rpartition(".")[2]
    why = f"sampled with {field} {value}: its logprobs are those without; leave {field} out of the request"
    assert reasons([made]) == [None if trained else why]
    validated = TripletMaker(TripletRules())(Trace(replace(TASK, mode="val"), "a", [made]))
    assert [t.trainable for t in validated] == [True], "a validation may be greedy"


def test_from_text_alone_a_call_needs_words_or_tool_calls():
    def said(message):
        attributes = {semconv.RESPONSE_ID: message, semconv.RESPONSE_MESSAGE: message}
        return span(TASK, "a", kind=semconv.LLM, attributes=attributes)

    spans = [
        said('{"role": "assistant", "content": "yes"}'),
        said('{"role": "assistant", "content": " "}'),
        said('{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}'),
        said('[{"role": "assistant", "parts": [{"type": "text", "content": "yes"}]}]'),
        said("not JSON"),
    ]
    assert reasons(spans, require_tokens=False) == [None, "empty response", None, None, "the response is not JSON"]
    assert reasons(spans[:1]) == ["no token ids or no logprobs"]


def no_short_prompts(call):
    return "a short prompt" if len(call.prompt) < 100 else None


def test_a_rule_of_the_users_own():
    assert reasons([call(TASK, "a", "1")], rules=(f"{__name__}:no_short_prompts",)) == ["a short prompt"]


def test_a_frameworks_span_around_a_call_is_no_call():
    outer = span(TASK, "a", span_id="chain", kind=semconv.LLM)
    sdk = span(TASK, "a", span_id="sdk", parent_id="chain", kind=semconv.LLM, attributes={semconv.RESPONSE_ID: "1"})
    spans = [call(TASK, "a", "1", parent_id="sdk"), sdk, outer]
    assert [t.reason for t in to_triplets(Trace(TASK, "a", spans))] == [None]


def test_spans_that_lie_within_each_other_do_not_hang():
    knot = [span(TASK, "a", span_id="x", parent_id="y"), span(TASK, "a", span_id="y", parent_id="x")]
    spans = [*knot, call(TASK, "a", "1", parent_id="x"), replace(reward(TASK, "a", 1.0), parent_id="y")]
    assert [t.reward for t in TripletMaker(TripletRules(match=("span",)))(Trace(TASK, "a", spans))] == [1.0]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('{"match": ["nearby"]}', "triplets.match"),
        ('{"clip": [1, -1]}', "clip: 1 is above -1"),
        ('{"agent_match": "("}', "agent_match is not a regular expression"),
        ('{"discount": 0.9}', "discount needs credit = discounted"),
        ('{"matches": ["final"]}', "triplets.matches"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch, setting, said):
    monkeypatch.setenv("MILLSTREAM_TRIPLETS", setting)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_settings()


def test_rules_come_from_the_settings_file(monkeypatch, tmp_path):
    file = tmp_path / "millstream.toml"
    file.write_text('[triplets]\nmatch = ["final"]\ncredit = "discounted"\ndiscount = 0.5\n')
    monkeypatch.setenv("MILLSTREAM_CONFIG", str(file))
    spans = [reward(TASK, "a", 1.0), call(TASK, "a", "1"), call(TASK, "a", "2")]
    assert [t.reward for t in TripletMaker(load_settings().triplets)(Trace(TASK, "a", spans))] == [0.5, 1.0]
