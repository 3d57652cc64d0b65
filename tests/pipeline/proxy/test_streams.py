"""Streams: forwarded as they come, ended when they are recorded, with every token's id."""

import asyncio
import json

import openai
import pytest
from policy_server import LOGPROB, Fault, ids
from proxy_rig import float32, int32, rig_of

from millstream.consumers.adapter.triplets import Trace, to_triplets
from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import RolloutTask

ASKED = {"model": "policy", "messages": [{"role": "user", "content": "say one two three"}], "stream": True}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


async def collected(stream):
    return [chunk async for chunk in stream]


def text_of(chunks):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


async def test_a_stream_is_recorded_token_by_token_and_the_client_does_not_see_it(rig):
    chunks = await collected(await rig.client.chat.completions.create(**ASKED))
    assert text_of(chunks) == "one two three"
    assert [len(chunk.choices) for chunk in chunks] == [1] * 5  # no usage: it was not asked for
    dumped = json.dumps([chunk.model_dump() for chunk in chunks])
    assert "token_ids" not in dumped
    assert str(LOGPROB) not in dumped
    span = await rig.span()
    assert span.prompt_token_ids == int32(ids("user say one two three"))
    assert span.response_token_ids == int32(ids("one two three"))
    assert span.response_logprobs == float32([LOGPROB] * 3)
    assert span.attributes[semconv.RESPONSE_ID] == chunks[0].id
    assert json.loads(span.attributes[semconv.RESPONSE_MESSAGE])["content"] == "one two three"
    assert (span.model_version, span.attributes[semconv.OUTPUT_TOKENS]) == ("run.0.3", "3")
    assert semconv.RESPONSE_VERSIONS not in span.attributes
    assert float(span.attributes["gen_ai.response.time_to_first_chunk"]) > 0


async def test_a_client_that_asks_for_usage_and_ids_gets_them(rig):
    extra = {"return_token_ids": True}
    options = {"include_usage": True}
    stream = await rig.client.chat.completions.create(**ASKED, stream_options=options, logprobs=True, extra_body=extra)
    chunks = await collected(stream)
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[1].model_dump()["choices"][0]["token_ids"] == ids("one")
    assert chunks[1].choices[0].logprobs.content[0].logprob == LOGPROB


async def test_tokens_are_passed_on_as_they_are_made(rig):
    rig.model.token_gate.clear()
    stream = await rig.client.chat.completions.create(**ASKED)
    async with asyncio.timeout(5):
        assert (await anext(stream)).choices[0].delta.role == "assistant"
        assert (await anext(stream)).choices[0].delta.content == "one"
    assert await rig.spans() == []
    rig.model.token_gate.set()
    assert text_of(await collected(stream)) == " two three"


async def test_the_end_comes_after_the_acknowledgement(rig):
    """When a client sees the finish reason, the call is in the log."""
    async for chunk in await rig.client.chat.completions.create(**ASKED):
        if chunk.choices[0].finish_reason:
            break
    assert len(await rig.spans()) == 1


async def test_weights_that_change_within_a_stream_are_mixed(rig):
    rig.model.token_gate.clear()
    stream = await rig.client.chat.completions.create(**ASKED)
    await anext(stream)
    rig.model.version = "run.0.4"
    rig.model.token_gate.set()
    await collected(stream)
    span = await rig.span()
    assert (span.model_version, span.attributes[semconv.RESPONSE_VERSIONS]) == (
        "mixed",
        '[[0,"run.0.3"],[1,"run.0.4"]]',
    )


async def test_a_stream_with_tools_is_asked_for_whole_since_parsers_swallow_tokens(rig):
    messages = [{"role": "user", "content": "call Oslo"}]
    async with rig.client.chat.completions.stream(model="policy", messages=messages, tools=[TOOL]) as stream:
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    assert not rig.model.requests[0].get("stream")
    span = await rig.span()
    assert len(span.response_token_ids) // 4 == int(span.attributes[semconv.OUTPUT_TOKENS])
    assert json.loads(span.attributes[semconv.FINISH_REASONS]) == ["tool_calls"]


async def test_incomplete_token_ids_cant_be_trained_on(rig):
    rig.model.lost_ids = 1
    await collected(await rig.client.chat.completions.create(**ASKED))
    task = RolloutTask(rollout_id=rig.rollout, group_id="g", input="{}", timeout_s=1, lease_s=1, created_at=0)
    (triplet,) = to_triplets(Trace(task, rig.attempt, await rig.spans()))
    assert (triplet.trainable, triplet.reason) == (False, "2 token ids, but the server counted 3 tokens")


async def test_when_a_client_leaves_its_stream_is_ended_and_recorded_so_far(rig):
    rig.model.token_gate.clear()
    stream = await rig.client.chat.completions.create(**ASKED)
    await anext(stream)
    await anext(stream)
    await stream.close()
    rig.model.token_gate.set()
    async with asyncio.timeout(5):
        assert await rig.close_attempt() == (200, {"spans": 1})
    span = await rig.span()
    assert (span.status_message, span.response_token_ids) == ("the client has gone", int32(ids("one")))
    assert json.loads(span.attributes[semconv.FINISH_REASONS]) == ["abort"]


async def test_a_stream_that_breaks_before_its_first_token_is_retried_unnoticed(rig):
    rig.model.faults.extend([Fault(break_after=0), Fault(abort_after=0), Fault(503)])
    chunks = await collected(await rig.client.chat.completions.create(**ASKED))
    assert text_of(chunks) == "one two three"
    assert len(rig.model.requests) == 4
    assert (await rig.span()).response_token_ids == int32(ids("one two three"))


async def test_a_stream_that_breaks_later_and_cant_be_continued_ends_with_an_error(rig):
    rig.model.faults.append(Fault(break_after=2))
    got = []

    async def read():
        async for chunk in await rig.client.chat.completions.create(**ASKED, presence_penalty=0.5):
            got.append(chunk)

    with pytest.raises(openai.APIError, match="broke off"):
        await read()
    assert text_of(got) == "one two"
    span = await rig.span()
    assert (span.status, span.response_token_ids) == ("Error", int32(ids("one two")))


async def test_external_streams_are_passed_on_byte_by_byte():
    external = {"upstreams": {"other": {"urls": ["{url}"], "kind": "openai"}}, "routes": {"*": "other"}}
    async with rig_of(**external) as rig:
        chunks = await collected(await rig.client.chat.completions.create(**ASKED))
        assert text_of(chunks) == "one two three"
        assert "return_token_ids" not in rig.model.requests[0]
        assert "logprobs" not in rig.model.requests[0]
        span = await rig.span()
        assert json.loads(span.attributes[semconv.RESPONSE_MESSAGE])["content"] == "one two three"
        assert span.response_token_ids is None
