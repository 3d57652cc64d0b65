"""Clients of Anthropic's messages and OpenAI's responses, in front of a policy: no token ids are lost."""

import base64
import json

import anthropic
import openai
import pytest
from policy_server import Fault, ids
from proxy_rig import int32, rig_of

from millstream.schemas.spans import semconv

SAY = [{"role": "user", "content": "say one two three"}]
CALL = [{"role": "user", "content": "call Oslo"}]
CLAUDE_TOOL = {"name": "weather", "description": "The weather", "input_schema": {"type": "object"}}
RESPONSES_TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}


async def assert_recorded(rig, response_id, response="one two three"):
    span = await rig.span()
    assert span.response_token_ids == int32(ids(response))
    assert span.prompt_token_ids
    assert span.attributes[semconv.RESPONSE_ID] == response_id
    assert span.attributes[semconv.OPERATION] == "chat"
    assert span.model_version == "run.0.3"
    return span


async def test_anthropic(rig):
    answer = await rig.claude.messages.create(model="policy", max_tokens=9, messages=SAY, system="be brief")
    assert [(block.type, block.text) for block in answer.content] == [("text", "one two three")]
    assert (answer.stop_reason, answer.role, answer.usage.output_tokens) == ("end_turn", "assistant", 3)
    span = await assert_recorded(rig, answer.id)
    messages = [{"role": "system", "content": "be brief"}, *SAY]
    assert rig.model.requests[0]["messages"] == messages
    assert json.loads(span.attributes[semconv.REQUEST_MESSAGES]) == messages
    assert span.attributes["gen_ai.request.max_tokens"] == "9"


async def test_anthropic_streams(rig):
    async with rig.claude.messages.stream(model="policy", max_tokens=9, messages=SAY) as stream:
        pieces = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert pieces == ["one", " two", " three"]
    assert (final.content[0].text, final.stop_reason) == ("one two three", "end_turn")
    assert (final.usage.input_tokens, final.usage.output_tokens) == (5, 3)
    await assert_recorded(rig, final.id)


@pytest.mark.parametrize("streamed", [False, True])
async def test_anthropic_tools_there_and_back(rig, streamed):
    asked = {"model": "policy", "max_tokens": 9, "messages": CALL, "tools": [CLAUDE_TOOL]}
    if streamed:
        async with rig.claude.messages.stream(**asked) as stream:
            answer = await stream.get_final_message()
    else:
        answer = await rig.claude.messages.create(**asked)
    (use,) = answer.content
    assert (use.type, use.name, use.input, answer.stop_reason) == ("tool_use", "weather", {"city": "Oslo"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "21"}]}
    told = {"role": "user", "content": [result, {"type": "text", "text": "say ok"}]}
    turns = [*CALL, {"role": "assistant", "content": [use.model_dump()]}, told]
    await rig.claude.messages.create(model="policy", max_tokens=9, messages=turns, tools=[CLAUDE_TOOL])
    function = {"name": "weather", "description": "The weather", "parameters": {"type": "object"}}
    assert rig.model.requests[1]["tools"] == [{"type": "function", "function": function}]
    asked, called, answered, said = rig.model.requests[1]["messages"]
    assert asked == CALL[0]
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert answered == {"role": "tool", "tool_call_id": use.id, "content": "21"}
    assert said == {"role": "user", "content": "say ok"}


async def test_anthropic_images_and_forced_tools(rig):
    pixels = base64.b64encode(b"png").decode()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": pixels}}
    content = [image, {"type": "text", "text": "say x"}]
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    await rig.claude.messages.create(
        model="policy",
        max_tokens=9,
        messages=[{"role": "user", "content": content}],
        tools=[CLAUDE_TOOL],
        tool_choice=choice,
        stop_sequences=["end"],
    )
    (request,) = rig.model.requests
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixels}"}}
    assert request["messages"][0]["content"][0] == part
    assert request["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert (request["parallel_tool_calls"], request["stop"]) == (False, ["end"])


async def test_anthropic_counts_tokens(rig):
    counted = await rig.claude.messages.count_tokens(model="policy", messages=SAY)
    assert counted.input_tokens == 5
    assert await rig.spans() == []


async def test_anthropic_errors_are_in_its_own_form(rig):
    rig.model.faults.append(Fault(400, {"error": {"message": "prompt too long"}}))
    with pytest.raises(anthropic.BadRequestError, match="prompt too long") as refused:
        await rig.claude.messages.create(model="policy", max_tokens=9, messages=SAY)
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.AuthenticationError):
        await rig.claude.with_options(api_key="x").messages.create(model="policy", max_tokens=9, messages=SAY)
    search = {"type": "web_search_20250305", "name": "web_search"}
    with pytest.raises(anthropic.BadRequestError, match="web_search"):
        await rig.claude.messages.create(model="policy", max_tokens=9, messages=SAY, tools=[search])
    rig.model.faults.append(Fault(break_after=1))
    penalty = {"presence_penalty": 0.5}  # else another replica would say the rest
    asked = {"model": "policy", "max_tokens": 9, "messages": SAY, "extra_body": penalty}
    stream = await rig.claude.messages.create(**asked, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="broke off"):
        [event async for event in stream]


async def test_responses(rig):
    answer = await rig.client.responses.create(model="policy", input="say one two three", instructions="be brief")
    assert (answer.output_text, answer.status, answer.usage.output_tokens) == ("one two three", "completed", 3)
    await assert_recorded(rig, answer.id)
    assert rig.model.requests[0]["messages"] == [{"role": "system", "content": "be brief"}, *SAY]


async def test_responses_stream(rig):
    async with rig.client.responses.stream(model="policy", input="say one two three") as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [e.delta for e in events if e.type == "response.output_text.delta"] == ["one", " two", " three"]
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))
    assert (final.output_text, final.usage.output_tokens) == ("one two three", 3)
    await assert_recorded(rig, final.id)


@pytest.mark.parametrize("streamed", [False, True])
async def test_responses_tools_there_and_back(rig, streamed):
    asked = {"model": "policy", "input": "call Oslo", "tools": [RESPONSES_TOOL]}
    if streamed:
        async with rig.client.responses.stream(**asked) as stream:
            answer = await stream.get_final_response()
    else:
        answer = await rig.client.responses.create(**asked)
    (call,) = answer.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Oslo"})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    items = [*CALL, call.model_dump(), output, {"role": "developer", "content": "say ok"}]
    again = await rig.client.responses.create(model="policy", input=items, tools=[RESPONSES_TOOL])
    assert again.output_text == "ok"
    _, called, answered, said = rig.model.requests[1]["messages"]
    assert called["tool_calls"][0]["id"] == answered["tool_call_id"] == call.call_id
    assert said == {"role": "system", "content": "say ok"}


async def test_responses_refuse_what_a_policy_cant_do(rig):
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        await rig.client.responses.create(model="policy", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="web_search"):
        await rig.client.responses.create(model="policy", input="x", tools=[{"type": "web_search"}])
    assert rig.model.requests == []


async def test_anthropic_in_front_of_any_openai_compatible_server():
    external = {"upstreams": {"other": {"urls": ["{url}"], "kind": "openai"}}, "routes": {"*": "other"}}
    async with rig_of(**external) as rig:
        async with rig.claude.messages.stream(model="m", max_tokens=9, messages=SAY) as stream:
            final = await stream.get_final_message()
        assert (final.content[0].text, final.usage.input_tokens) == ("one two three", 5)
        assert (await rig.span()).response_token_ids is None
