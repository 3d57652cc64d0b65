"""Each dialect's names come out as ours. What real libraries write is in tests/consumers/adapter/test_golden.py."""

import json
import struct

import pytest
from factories import span, task
from hypothesis import given
from hypothesis import strategies as st

from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import DIALECTS, kind_of, normalised, rewards_of
from millstream.schemas.wire.records import SpanEvent

TASK = task()


def read(attributes, *events, **fields):
    return normalised(span(TASK, "a", attributes=attributes, kind=kind_of(attributes), events=events, **fields))


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({semconv.OPERATION: "chat"}, semconv.LLM),
        ({"gen_ai.request.type": "chat"}, semconv.LLM),
        ({"openinference.span.kind": "LLM"}, semconv.LLM),
        ({"openinference.span.kind": "TOOL"}, semconv.TOOL),
        ({"openinference.span.kind": "AGENT"}, semconv.AGENT),
        ({"openinference.span.kind": "RETRIEVER"}, semconv.SPAN),
        ({"llm.request.type": "chat"}, semconv.LLM),
        ({"llm.request.type": "embedding"}, semconv.SPAN),
        ({"traceloop.span.kind": "workflow"}, semconv.CHAIN),
        ({semconv.OPERATION: "execute_task", "traceloop.span.kind": "task"}, semconv.CHAIN),
        ({"agentops.span.kind": "AgentOpsSpanKindValues.TOOL"}, semconv.TOOL),
        ({"agentlightning.reward.0.value": "1.0"}, semconv.REWARD),
        ({semconv.ALERT_NAME: "x"}, semconv.ALERT),
        ({"some": "thing"}, semconv.SPAN),
    ],
)
def test_what_a_span_is(attributes, kind):
    assert kind_of(attributes) == kind


def test_a_span_in_our_names_is_the_same_object():
    ours = span(TASK, "a", kind=semconv.LLM, attributes={semconv.OPERATION: "chat", semconv.RESPONSE_ID: "1"})
    assert normalised(ours) is ours


def test_earlier_conventions():
    found = read(
        {
            "gen_ai.request.type": "chat",
            "gen_ai.prompt.0.role": "user",
            "gen_ai.prompt.0.content": "1 + 2?",
            "gen_ai.prompt.10.role": "tool",
            "gen_ai.prompt.10.tool_call_id": "c1",
            "gen_ai.prompt.10.content": "3",
            "gen_ai.prompt.2.role": "assistant",
            "gen_ai.prompt.2.tool_calls.0.id": "c1",
            "gen_ai.prompt.2.tool_calls.0.name": "add",
            "gen_ai.prompt.2.tool_calls.0.arguments": '{"a": 1}',
            "gen_ai.completion.0.role": "assistant",
            "gen_ai.completion.0.content": "It is 3.",
            "gen_ai.completion.0.finish_reason": "stop",
            "gen_ai.usage.prompt_tokens": "7",
            "llm.request.functions.0.name": "add",
            "llm.request.functions.0.parameters": '{"type": "object"}',
        }
    ).attributes
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert json.loads(found[semconv.INPUT_MESSAGES]) == [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    assert json.loads(found[semconv.OUTPUT_MESSAGES]) == [{"role": "assistant", "content": "It is 3."}]
    assert found[semconv.FINISH_REASONS] == '["stop"]'
    assert found[semconv.INPUT_TOKENS] == "7"
    assert json.loads(found[semconv.TOOL_DEFINITIONS]) == [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    ]


def test_messages_in_events():
    def event(name, **attributes):
        return SpanEvent(name=name, time=0, attributes=attributes)

    body = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "3"}}
    events = [
        event("gen_ai.user.message", content="1 + 2?"),
        event("gen_ai.tool.message", id="c1", content="3"),
        event("gen_ai.choice", **{"gen_ai.event.content": json.dumps(body)}),
    ]
    found = read({semconv.OPERATION: "chat"}, *events).attributes
    assert json.loads(found[semconv.INPUT_MESSAGES]) == [
        {"role": "user", "content": "1 + 2?"},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    assert json.loads(found[semconv.OUTPUT_MESSAGES]) == [{"role": "assistant", "content": "3"}]
    assert found[semconv.FINISH_REASONS] == '["stop"]'

    whole = event("gen_ai.content.prompt", **{"gen_ai.prompt": '[{"role": "user", "content": "1 + 2?"}]'})
    found = read({semconv.OPERATION: "chat"}, whole).attributes
    assert found[semconv.INPUT_MESSAGES] == '[{"role": "user", "content": "1 + 2?"}]'


def test_open_inference_with_an_image():
    content = "llm.input_messages.0.message.contents."
    found = read(
        {
            "openinference.span.kind": "LLM",
            "llm.input_messages.0.message.role": "user",
            content + "0.message_content.type": "text",
            content + "0.message_content.text": "What is it?",
            content + "1.message_content.type": "image",
            content + "1.message_content.image.image.url": "data:image/png;base64,AA==",
            "llm.tools.0.tool.json_schema": '{"type": "function", "function": {"name": "add"}}',
        }
    ).attributes
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    assert json.loads(found[semconv.INPUT_MESSAGES]) == [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}
    ]
    assert json.loads(found[semconv.TOOL_DEFINITIONS]) == [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ({"openinference.span.kind": "AGENT", "agent.name": "writer"}, "writer"),
        ({"openinference.span.kind": "AGENT", "graph.node.id": "writer"}, "writer"),
        ({"traceloop.span.kind": "agent", "traceloop.entity.name": "writer"}, "writer"),
        ({"agentops.span.kind": "agent", "operation.name": "writer"}, "writer"),
        ({"traceloop.span.kind": "tool", "traceloop.entity.name": "add"}, None),
    ],
)
def test_names_of_agents(attributes, name):
    assert read(attributes).attributes.get(semconv.AGENT_NAME) == name


@pytest.mark.parametrize(
    "attributes",
    [
        {"openinference.span.kind": "TOOL", "tool.name": "add", "input.value": "1", "output.value": "2"},
        {"traceloop.span.kind": "tool", "traceloop.entity.name": "add"}
        | {"traceloop.entity.input": "1", "traceloop.entity.output": "2"},
        {"agentops.span.kind": "tool", "tool.name": "add", "tool.parameters": "1", "tool.result": "2"},
    ],
)
def test_tool_calls(attributes):
    found = read(attributes).attributes
    assert [found[name] for name in (semconv.TOOL_NAME, semconv.TOOL_ARGUMENTS, semconv.TOOL_RESULT)] == [
        "add",
        "1",
        "2",
    ]


def test_token_ids_and_logprobs_in_attributes():
    attributes = {
        "gen_ai.request.type": "chat",
        "prompt_token_ids": "[1, 2]",
        "response_token_ids": "[7]",
        "logprobs.content": '[{"token": "a", "logprob": -0.5}]',
    }
    found = read(attributes)
    assert found.prompt_token_ids == struct.pack("<2i", 1, 2)
    assert (found.response_token_ids, found.response_logprobs) == (struct.pack("<i", 7), struct.pack("<f", -0.5))
    assert read(attributes, response_token_ids=b"\x01\0\0\0").response_token_ids == b"\x01\0\0\0"
    assert read(attributes | {"response_token_ids": '["a"]'}).response_token_ids is None


def test_rewards_of_several_dimensions_and_a_link():
    attributes = {
        "agentlightning.reward.0.name": "right",
        "agentlightning.reward.0.value": "1.0",
        "agentlightning.reward.1.name": "short",
        "agentlightning.reward.1.value": "0.25",
        "agentlightning.link.0.key_match": "gen_ai.response.id",
        "agentlightning.link.0.value_match": "chatcmpl-1",
    }
    assert rewards_of(attributes) == [("right", 1.0), ("short", 0.25)]
    assert rewards_of({semconv.EVALUATION_NAME: "x", semconv.EVALUATION_SCORE: "2"} | attributes) == [
        ("x", 2.0),
        ("short", 0.25),
    ]
    assert rewards_of({semconv.EVALUATION_NAME: "x", "gen_ai.evaluation.score.label": "good"}) == []
    assert read(attributes).attributes[semconv.REWARD_FOR] == "chatcmpl-1"


RESTS = ("role", "message.role", "tool_calls.0.id", "parameters", "content")
numbered = [
    f"{prefix}{n}.{rest}"
    for dialect in DIALECTS.values()
    for prefix in (dialect.prompts, dialect.completions, dialect.tools)
    for n in ("0", "1", "x")
    for rest in RESTS
]
known = [name for dialect in DIALECTS.values() for name in (*dialect.says, *dialect.names)]
odd = [
    "output.value",
    "prompt_token_ids",
    "logprobs.content",
    semconv.AGL_REWARD_VALUE,
    "agentlightning.link.0.key_match",
]
texts = st.one_of(
    st.sampled_from(["chat", "LLM", "tool", "[1]", "[[1]]", "[1e99]", "{}", "[", '{"id": 1}']),
    st.text('{}[]":1a', max_size=6),
)


@given(st.dictionaries(st.sampled_from(known + numbered + odd), texts))
def test_whatever_is_in_it_a_span_is_read_and_keeps_what_it_had(attributes):
    found = read(attributes)
    assert attributes.items() <= found.attributes.items()
    assert normalised(found) == found
    rewards_of(attributes)
