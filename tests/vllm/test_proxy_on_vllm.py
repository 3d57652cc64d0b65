"""The proxy in front of a real vLLM: what its spans hold is token by token what vLLM gives to a direct request with the
same seed, whichever interface the agent speaks, whole or streamed."""

import asyncio
import json
import struct
import sys

import pytest
import versioned_model

pytest.importorskip("torch")


from proxy_rig import float32, int32, rig_of
from relay import relay_to

from millstream.schemas.spans import semconv
from millstream.schemas.wire.versions import from_text

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="session"),
]

MESSAGES = [{"role": "user", "content": "add 3 to 8 ?"}]
# Kept from its own token, the versioned model says all kinds of things; the seed says which.
SAMPLING = {
    "temperature": 2.0,
    "seed": 7,
    "frequency_penalty": 2.0,
    "presence_penalty": 2.0,
    "logit_bias": {str(versioned_model.token(1)): -100},
}
TOKENS = 24
TOOL = {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}}
SHARED = {"model": "policy", "messages": MESSAGES}


async def chat(rig, stream, **more):
    answer = await rig.client.chat.completions.create(**SHARED, max_tokens=TOKENS, **SAMPLING, stream=stream, **more)
    if not stream:
        return answer.choices[0].message.content
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


async def tools(rig, stream):
    return await chat(rig, stream, tools=[{"type": "function", "function": TOOL}])


async def completions(rig, stream):
    asked = {"model": "policy", "prompt": "add 3 to 8 ?", "max_tokens": TOKENS, **SAMPLING}
    answer = await rig.client.completions.create(**asked, stream=stream)
    return "".join([c.choices[0].text async for c in answer]) if stream else answer.choices[0].text


async def anthropic(rig, stream):
    sampling = {"extra_body": SAMPLING}
    if stream:
        async with rig.claude.messages.stream(**SHARED, max_tokens=TOKENS, **sampling) as events:
            return (await events.get_final_message()).content[0].text
    return (await rig.claude.messages.create(**SHARED, max_tokens=TOKENS, **sampling)).content[0].text


async def responses(rig, stream):
    asked = {"model": "policy", "input": "add 3 to 8 ?", "max_output_tokens": TOKENS, "extra_body": SAMPLING}
    if stream:  # cut off by its length: the SDK's own final answer would be an error
        events = await rig.client.responses.create(**asked, stream=True)
        return "".join([event.delta async for event in events if event.type == "response.output_text.delta"])
    return (await rig.client.responses.create(**asked)).output_text


async def directly(client, path, body):
    body = {"model": "policy", "max_tokens": TOKENS, **SAMPLING, "return_token_ids": True, **body}
    async with client.session.post(client.url + path, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, tools, completions, anthropic, responses])
async def test_spans_hold_what_vllm_gives_to_a_direct_request(server, client, ask, stream):
    await server.update(versioned_model.weights(1), "tell.1.1")
    if ask is completions:
        whole = await directly(client, "/v1/completions", {"prompt": "add 3 to 8 ?", "logprobs": 0})
        (choice,) = whole["choices"]
        text, prompt, logprobs = choice["text"], choice["prompt_token_ids"], choice["logprobs"]["token_logprobs"]
    else:
        offered = {"tools": [{"type": "function", "function": TOOL}]} if ask is tools else {}
        whole = await directly(client, "/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, **offered})
        (choice,) = whole["choices"]
        text, prompt = choice["message"]["content"], whole["prompt_token_ids"]
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    assert len(set(choice["token_ids"])) > 4  # else any text would do
    async with rig_of(upstreams={"model": {"urls": [client.url]}}) as rig:
        assert await ask(rig, stream) == text
        span = await rig.span()
    assert span.response_token_ids == int32(choice["token_ids"])
    assert span.prompt_token_ids == int32(prompt)
    assert span.response_logprobs == float32(logprobs)
    assert span.model_version == "tell.1.1"


@pytest.mark.parametrize("ask", [chat, completions, anthropic, responses])
async def test_a_stream_that_breaks_twice_equals_an_unbroken_one(server, client, ask, monkeypatch):
    await server.update(versioned_model.babbling(), "tell.1.1")
    monkeypatch.setattr(sys.modules[__name__], "SAMPLING", {"temperature": 0.0})
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", 100)
    async with relay_to(client.url) as relay, rig_of(upstreams={"model": {"urls": [relay.url]}}) as rig:
        unbroken = await ask(rig, stream=True)
        relay.cuts = [5, 8]
        assert await ask(rig, stream=True) == unbroken
        first, second = await rig.spans()
    assert second.attributes[semconv.CONTINUED] == "2"
    assert len(set(first.response_token_ids[::4])) > 4  # else any text would do
    for same in ("prompt_token_ids", "response_token_ids", "response_logprobs", "model_version", "status"):
        assert getattr(second, same) == getattr(first, same), same
    for same in (semconv.OUTPUT_TOKENS, semconv.INPUT_TOKENS, semconv.FINISH_REASONS, semconv.RESPONSE_MESSAGE):
        assert second.attributes[same] == first.attributes[same]


async def test_a_stream_that_a_pause_aborts_is_continued(server, client):
    """Our own updates keep running requests; those of others may not."""
    await server.update(versioned_model.babbling(), "tell.1.1")
    asked = {**SHARED, "temperature": 0.0, "stream": True}
    async with rig_of(upstreams={"model": {"urls": [client.url]}}) as rig:

        async def text(stream):
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        unbroken = await text(await rig.client.chat.completions.create(**asked))
        stream = await rig.client.chat.completions.create(**asked)
        begun = "".join([(await anext(stream)).choices[0].delta.content for _ in range(5)])
        await server.replicas[0]._post("/pause", params={"mode": "abort"})
        await server.replicas[0]._post("/resume")
        assert begun + await text(stream) == unbroken
        first, aborted = await rig.spans()
    assert aborted.attributes[semconv.CONTINUED] == "1"
    assert aborted.response_token_ids == first.response_token_ids


async def test_a_stop_string_ends_a_stream_that_was_broken(server, client):
    await server.update(versioned_model.babbling(), "tell.1.1")
    asked = {**SHARED, "temperature": 0.0, "stream": True, "stop": ["."]}
    async with relay_to(client.url) as relay, rig_of(upstreams={"model": {"urls": [relay.url]}}) as rig:

        async def text():
            stream = await rig.client.chat.completions.create(**asked)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        unbroken = await text()
        relay.cuts = [40]
        assert await text() == unbroken
        first, broken = await rig.spans()
    assert unbroken.endswith(" system second ")
    assert (broken.attributes[semconv.CONTINUED], broken.attributes[semconv.FINISH_REASONS]) == ("1", '["stop"]')
    assert broken.response_token_ids == first.response_token_ids


async def test_structured_output_and_several_choices_pass_through(server, client):
    await server.update(versioned_model.weights(1), "tell.1.1")
    async with rig_of(upstreams={"model": {"urls": [client.url]}}) as rig:
        answer = await rig.client.chat.completions.create(**SHARED, max_tokens=3, n=2, **SAMPLING)
        assert len(answer.choices) == 2
        choice = {"structured_outputs": {"choice": ["add", "then"]}}
        answer = await rig.client.chat.completions.create(**SHARED, max_tokens=3, **SAMPLING, extra_body=choice)
        assert answer.choices[0].message.content.strip() in ("add", "then")
        counted = await rig.claude.messages.count_tokens(**SHARED)
        *_, span = await rig.spans()
        assert counted.input_tokens == len(span.prompt_token_ids) // 4


async def test_weights_that_change_under_streams_of_the_sdk_are_recorded_token_by_token(server, client):
    """Each token of the versioned model shows which weights made it, and is compared with the version in the span."""
    await server.update(versioned_model.weights(0), "tell.1.0")
    async with rig_of(upstreams={"model": {"urls": [client.url]}}) as rig:
        done = asyncio.Event()

        async def updates():
            for number in range(1, 9):
                await asyncio.sleep(0.1)  # so that tokens are made in between
                await server.update(versioned_model.weights(number), f"tell.1.{number}")
            done.set()

        async def ask(stream):
            while not done.is_set():
                asked = {**SHARED, "max_tokens": 100, "temperature": 0.0, "stream": stream}
                answer = await rig.client.chat.completions.create(**asked)
                if stream:
                    _ = [chunk async for chunk in answer]

        await asyncio.gather(updates(), *(ask(stream=i % 4 != 0) for i in range(16)))
        spans = await rig.spans()
    crossed = 0
    for span in spans:
        made = struct.unpack(f"<{len(span.response_token_ids) // 4}i", span.response_token_ids)
        versions = {f"tell.1.{versioned_model.AIM - token}" for token in made}
        assert len(made) == 100
        crossed += len(versions) > 1
        if len(versions) > 1:
            ranges = from_text(span.attributes[semconv.RESPONSE_VERSIONS], len(made))
            starts = [n for n in range(len(made)) if n == 0 or made[n] != made[n - 1]]
            assert ranges == tuple([(n, f"tell.1.{versioned_model.AIM - made[n]}") for n in starts])
        assert span.model_version == (versions.pop() if len(versions) == 1 else "mixed"), json.dumps(made)
    assert crossed >= 8  # else nothing was updated under load
