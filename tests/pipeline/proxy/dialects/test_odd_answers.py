"""Answers that are no proper JSON, tokens that can't be trained on, and servers that behave oddly: the client gets what
it would get of the server itself, and the span says why the call can't be trained on."""

import asyncio
import gzip
import json
import math

import aiohttp
import anthropic
import openai
import pytest
from policy_server import Fault, ids
from proxy_rig import int32, rig_of

from millstream.pipeline.proxy.app import ProxyPolicy
from millstream.pipeline.proxy.upstreams.http_client import ConnectionPolicy
from millstream.pipeline.proxy.upstreams.replicas import ReplicaPolicy, retry_after_s
from millstream.schemas.spans import semconv
from tests.pipeline.proxy.dialects.raw_server import JSON, STREAM, served

SAY = [{"role": "user", "content": "say a b"}]
ASKED = {"model": "policy", "messages": SAY}
HEAD = {"id": "chatcmpl-1", "created": 1, "model": "policy"}
USAGE = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
NUMBERS = ["null", "NaN", "-Infinity", "Infinity", '"x"', "1e39", "[]", "{}"]


def chat(said, reason="stop", **choice):
    choice = {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": reason, **choice}
    return HEAD | {"object": "chat.completion", "choices": [choice], "usage": USAGE, "prompt_token_ids": [1, 2]}


def logprobs(number):
    return {
        "content": [{"token": t, "logprob": n, "bytes": [], "top_logprobs": []} for t, n in (("a", -1), ("b", number))]
    }


def events(*chunks):
    return b"".join(b"data: " + json.dumps(HEAD | chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def piece(delta, reason=None, **choice):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason, **choice}]}


async def post(rig, path="/v1/chat/completions", body=None, **asked):
    """The status and the bytes of an answer, and its headers."""
    data = json.dumps({**ASKED, **asked}).encode() if body is None else body
    headers = {"Authorization": f"Bearer {rig.key}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(rig.base + path, data=data, headers=headers) as response,
    ):
        return response.status, await response.read(), response.headers


# --- Log-probabilities


@pytest.mark.parametrize("number", NUMBERS)
async def test_a_log_probability_that_is_no_number_passes_and_is_not_trained_on(number):
    """Entry E1: 500, or five tries and 502."""
    async with served("vllm") as (raw, rig):
        whole = chat({"content": "a b"}, token_ids=[5, 6], logprobs=logprobs("@"))
        told = {"token_ids": [5, 6], "logprobs": logprobs("@")}
        stream = events(
            piece({"role": "assistant", "content": "a b"}, **told), piece({}, "stop"), {"choices": [], "usage": USAGE}
        )
        for body, kind in ((json.dumps(whole).encode(), JSON), (stream, STREAM)):
            raw.answers(body.replace(b'"@"', number.encode()), kind)
            status, answer, _ = await post(rig, logprobs=True, stream=kind == STREAM)
            assert status == 200
            found = json.loads(answer.removeprefix(b"data: ").split(b"\n")[0])["choices"][0]["logprobs"]["content"]
            assert repr(found[1]["logprob"]) == repr(json.loads(number))
            plain = await post(rig, stream=kind == STREAM)
            assert plain[0] == 200
            assert b"a b" in plain[1]
        spans = await rig.spans()
    assert len(spans) == 4
    for span in spans:
        assert span.status == "Ok"
        assert "finite" in span.attributes[semconv.UNTRAINABLE] or "form" in span.attributes[semconv.UNTRAINABLE]
        assert (span.response_token_ids, span.response_logprobs) == (int32([5, 6]), None)


@pytest.mark.parametrize("tokens", ['[1, "x"]', "[1, null]", "[1, 2.5]", "[1, 99999999999]", '"ab"', "5", "{}"])
@pytest.mark.parametrize("name", ["token_ids", "prompt_token_ids"])
async def test_token_ids_that_are_none_pass_and_are_not_trained_on(name, tokens):
    async with served("vllm") as (raw, rig):
        whole = chat({"content": "a b"}, token_ids=[5, 6], logprobs=logprobs(-1))
        (whole if name in whole else whole["choices"][0])[name] = "@"
        raw.answers(json.dumps(whole).replace('"@"', tokens).encode(), JSON)
        answer = await rig.client.chat.completions.create(**ASKED)
        assert answer.choices[0].message.content == "a b"
        span = await rig.span()
    assert (span.status, bool(span.attributes[semconv.UNTRAINABLE])) == ("Ok", True)


@pytest.mark.parametrize("stream", [False, True])
async def test_with_echo_the_prompts_log_probabilities_dont_stand_beside_the_answers_ids(stream):
    """Entry E1: the first of them is null."""
    async with served("vllm") as (raw, rig):
        told = {"tokens": ["say", " a", " b"], "token_logprobs": [None, -1.0, -0.5]}
        choice = {"index": 0, "text": "say a b", "token_ids": [7], "prompt_token_ids": [1, 2], "logprobs": told}
        answer = HEAD | {"choices": [{**choice, "finish_reason": "stop"}], "usage": USAGE | {"completion_tokens": 1}}
        raw.answers(events(answer) if stream else json.dumps(answer).encode(), STREAM if stream else JSON)
        body = {"model": "policy", "prompt": "say a", "echo": True, "logprobs": 0, "stream": stream}
        status, got, _ = await post(rig, "/v1/completions", json.dumps(body).encode())
        assert (status, b"null" in got, b"say a b" in got) == (200, True, True)
        span = await rig.span()
    assert (span.response_token_ids, len(span.response_logprobs)) == (int32([7]), 4)
    assert "echo" in span.attributes[semconv.UNTRAINABLE]


# --- Bytes and digits


LONG = 2**70 + 1


async def test_a_request_passes_as_it_came_where_nothing_of_it_changes():
    """Entry E2."""
    body = (
        b'{ "model":"policy", "seed": %d,\n "x": 1e400, "messages":[{"role":"user","content":"\\ud83d caf\\u00e9"}] }'
        % LONG
    )
    async with served("openai") as (raw, rig):
        raw.answers(json.dumps(chat({"content": "a"})).encode(), JSON)
        assert (await post(rig, body=body))[0] == 200
        assert raw.bodies == [body]
        span = await rig.span()
    assert span.attributes["gen_ai.request.seed"] == str(LONG)
    assert json.loads(span.attributes[semconv.REQUEST_MESSAGES])[0]["role"] == "user"


@pytest.mark.parametrize(("kind", "model"), [("vllm", "policy"), ("openai", "x/policy")])
async def test_integers_keep_their_digits_where_a_field_is_added_or_changed(kind, model):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "integer", "maximum": LONG}}}]
    async with served(kind, upstream={"strip_prefix": "x/"}) as (raw, rig):
        raw.answers(json.dumps(chat({"content": "a"})).encode(), JSON)
        assert (await post(rig, model=model, tools=tools, seed=LONG))[0] == 200
        (asked,) = raw.asked
        assert (asked["tools"], asked["seed"], asked["model"]) == (tools, LONG, "policy")
        span = await rig.span()
    assert json.loads(span.attributes[semconv.TOOL_DEFINITIONS]) == tools


@pytest.mark.parametrize("stream", [False, True])
async def test_a_policy_may_write_a_large_integer(stream):
    """Entry E2: an Anthropic client got 500."""
    async with served("vllm") as (raw, rig):
        function = {"name": "f", "arguments": json.dumps({"x": LONG})}
        calls = [{"id": "c", "type": "function", "function": function}]
        raw.answers(json.dumps(chat({"content": None, "tool_calls": calls}, "tool_calls")).encode(), JSON)
        tools = [{"name": "f", "input_schema": {"type": "object"}}]
        asked = {"model": "policy", "max_tokens": 9, "messages": SAY, "tools": tools}
        if stream:
            async with rig.claude.messages.stream(**asked) as found:
                message = await found.get_final_message()
        else:
            message = await rig.claude.messages.create(**asked)
        assert message.content[0].input == {"x": LONG}
        assert str(LONG) in (await rig.span()).attributes[semconv.RESPONSE_MESSAGE]


HIGH, LOW = "\ud83d", "\ude00"


@pytest.mark.parametrize("kind", ["vllm", "openai"])
@pytest.mark.parametrize("form", ["whole", "stream", "one half"])
async def test_half_a_character_reaches_the_client_as_it_came(kind, form):
    """Entry E3: 502."""
    said = HIGH if form == "one half" else HIGH + LOW
    async with served(kind) as (raw, rig):
        if form == "stream":
            halves = [piece({"content": "a" + HIGH}), piece({"content": LOW + "b"}), piece({}, "stop")]
            raw.answers(events(*halves), STREAM)
            stream = await rig.client.chat.completions.create(**ASKED, stream=True)
            pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
            assert pieces[:2] == ["a" + HIGH, LOW + "b"]
            stream = await rig.claude.messages.create(max_tokens=9, **ASKED, stream=True)
            texts = [e.delta.text async for e in stream if e.type == "content_block_delta"]
            assert texts == pieces[:2]
        else:
            raw.answers(json.dumps(chat({"content": f"a{said}b"})).encode(), JSON)
            answer = await rig.client.chat.completions.create(**ASKED)
            assert answer.choices[0].message.content == json.loads(json.dumps(f"a{said}b"))
            message = await rig.claude.messages.create(max_tokens=9, **ASKED)
            assert message.content[0].text == answer.choices[0].message.content
        spans = await rig.spans()
    assert len(spans) == 2
    for span in spans:
        assert span.status == "Ok"
        recorded = json.loads(span.attributes[semconv.RESPONSE_MESSAGE])["content"]
        assert recorded.startswith("a")
        assert recorded.endswith("b")


async def test_bytes_that_are_no_utf8_pass_as_they_came():
    body = json.dumps(chat({"content": "a@b"})).encode().replace(b"@", b"\xf0\x9f")
    async with served("openai") as (raw, rig):
        raw.answers(body, JSON)
        assert (await post(rig))[:2] == (200, body)
        assert json.loads((await rig.span()).attributes[semconv.RESPONSE_MESSAGE])["content"].startswith("a\ufffd")
    async with served("vllm") as (raw, rig):
        raw.answers(body, JSON)
        assert json.loads((await post(rig))[1])["choices"][0]["message"]["content"].startswith("a\ufffd")


# --- Choices, images, errors


@pytest.mark.parametrize("kind", ["vllm", "openai"])
@pytest.mark.parametrize("stream", [False, True])
async def test_all_choices_are_recorded_and_the_reason_is_their_number(kind, stream):
    """Entry E10: the span held no answer at all."""
    texts = ["a", "b", "c"]
    async with served(kind) as (raw, rig):
        if stream:
            chunks = [
                {"choices": [{"index": n, "delta": {"content": t}, "finish_reason": "stop"}]}
                for n, t in enumerate(texts)
            ]
            raw.answers(events(*reversed(chunks)), STREAM)
        else:
            choices = [chat({"content": text})["choices"][0] | {"index": n} for n, text in enumerate(texts)]
            raw.answers(json.dumps(chat({}) | {"choices": choices}).encode(), JSON)
        status, answer, _ = await post(rig, n=3, stream=stream)
        assert (status, [t for t in texts if f'"{t}"'.encode() in answer]) == (200, texts)
        span = await rig.span()
    assert [m["content"] for m in json.loads(span.attributes[semconv.RESPONSE_MESSAGE])] == texts
    assert json.loads(span.attributes[semconv.FINISH_REASONS]) == ["stop"] * 3
    assert span.attributes[semconv.UNTRAINABLE] == "the call has 3 choices; calls with one can be trained on"


async def test_images_of_tool_results_reach_a_vision_policy(rig):
    """Entry E9: 400."""
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    content = [{"type": "text", "text": "a screenshot"}, {"type": "image", "source": source}]
    messages = [
        {"role": "user", "content": "say look"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": content},
                {"type": "tool_result", "tool_use_id": "t2", "content": "text"},
                {"type": "tool_result", "tool_use_id": "t3"},
                {"type": "text", "text": "say done"},
            ],
        },
    ]
    await rig.claude.messages.create(model="policy", max_tokens=9, messages=messages)
    *_, first, second, third, user = rig.model.requests[0]["messages"]
    assert [(m["role"], m["content"]) for m in (first, second, third)] == [
        ("tool", "a screenshot"),
        ("tool", "text"),
        ("tool", ""),
    ]
    assert user["content"][1] == {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert user["content"][-1] == {"type": "text", "text": "say done"}


async def test_a_compressed_error_keeps_its_reason():
    """Entry E8."""
    body = b'{"error": {"message": "the prompt is too long"}}'
    for encoding, encoded in (("gzip", gzip.compress(body, mtime=0)), ("identity", body)):
        async with served("openai") as (raw, rig):
            raw.answers(encoded, JSON, encoding=encoding, status=400)
            with pytest.raises(openai.BadRequestError, match="the prompt is too long"):
                await rig.client.chat.completions.create(**ASKED)
            assert (await rig.span()).status_message == "the prompt is too long"


@pytest.mark.parametrize("cut", [1, 2, 7, None])
async def test_gzip_of_several_members_is_one_answer(cut):
    body = json.dumps(chat({"content": "a b"})).encode()
    async with served("openai") as (raw, rig):
        raw.answers(gzip.compress(body[:50], mtime=0) + gzip.compress(body[50:]), JSON, encoding="gzip", cut=cut)
        assert (await post(rig))[:2] == (200, body)


async def test_an_error_with_status_200_reaches_a_translated_client_as_an_error():
    async with served("openai", upstream={"timeout_s": 1.0}) as (raw, rig):
        raw.answers(b'{"error": {"message": "no provider", "code": 502}}', JSON)
        assert (await post(rig))[:2] == (200, b'{"error": {"message": "no provider", "code": 502}}')
        with pytest.raises(anthropic.APIStatusError, match="no provider"):
            await rig.claude.messages.create(max_tokens=9, **ASKED)
        assert [span.status for span in await rig.spans()] == ["Error", "Error"]


@pytest.mark.parametrize(
    ("header", "passed"),
    [
        ("0.01", True),
        ("7", True),
        ("1e300", True),
        ("Wed, 21 Oct 2099 07:28:00 GMT", True),
        *(
            (odd, False)
            for odd in ("inf", "-inf", "nan", "-5", "soon", "", "Wed, 99 Oct 2099", "Wed, 21 Oct 99999999 07:28:00 GMT")
        ),
    ],
)
async def test_any_retry_after_leaves_the_servers_refusal(header, passed):
    """Entry E12: "inf" was 500."""
    async with rig_of(upstreams={"model": {"urls": ["{url}"], "timeout_s": 1.0}}) as rig:
        rig.model.faults.extend([Fault(429, {"error": {"message": "slow down"}}, {"Retry-After": header})] * 10)
        status, body, headers = await post(rig)
        assert (status, json.loads(body)["error"]["message"]) == (429, "slow down")
        assert headers.get("Retry-After") == (header if passed else None)
        assert math.isfinite(retry_after_s(header))


# --- Time and room


async def test_pings_keep_a_client_waiting_for_the_first_token():
    """Entry E5: a client with a read time-out failed."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for _ in range(8):
            writer.write(b": keep-alive\n\n")
            await asyncio.sleep(0.1)
        writer.write(events(piece({"content": "a"}, "stop")))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        for kind in ("openai", "vllm"):
            upstreams = {"model": {"urls": [f"http://{host}:{port}"], "kind": kind}}
            async with rig_of(upstreams=upstreams, routes={"*": "model"}) as rig:
                client = rig.client.with_options(timeout=0.5)
                stream = await client.chat.completions.create(**ASKED, stream=True)
                assert [c.choices[0].delta.content async for c in stream if c.choices] == ["a"]


BOUNDED = ProxyPolicy(replicas=ReplicaPolicy(tries=1, connections=ConnectionPolicy(head=10_000, body=100_000)))


@pytest.mark.parametrize(
    ("lines", "body", "encoding", "message"),
    [
        ("X: " + "x" * 1_000_000 + "\r\n", b"{}", "", "the head of its answer"),
        ("X: y\r\n" * 200_000, b"{}", "", "the head of its answer"),
        ("", b"x" * 100_001, "", "the answer has more than 100,000 bytes"),
        ("", gzip.compress(b"x" * 50_000_000, mtime=0), "gzip", "the answer has more than 100,000 bytes"),
        ("", b"no gzip at all", "gzip", "can't be decompressed"),
        ("", gzip.compress(b"{}" * 1000, mtime=0)[:-10], "gzip", "incomplete"),
    ],
)
async def test_the_head_and_the_body_of_an_answer_are_bounded(lines, body, encoding, message):
    """Entry E12."""
    async with served("openai", policy=BOUNDED) as (raw, rig):
        raw.answers(body, JSON, encoding=encoding, lines=lines)
        status, answer, _ = await post(rig)
        assert (status, message in json.loads(answer)["error"]["message"]) == (502, True), answer


async def test_interim_answers_without_end_are_bounded():
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        try:
            while True:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
                await writer.drain()
        except ConnectionError:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        upstreams = {"model": {"urls": [f"http://{host}:{port}"], "kind": "openai"}}
        async with rig_of(policy=BOUNDED, upstreams=upstreams, routes={"*": "model"}) as rig:
            status, body, _ = await post(rig)
            assert (status, b"the head of its answer" in body) == (502, True)


async def test_a_stream_without_bound_ends_for_its_client_with_an_error():
    async with served("openai", policy=BOUNDED) as (raw, rig):
        raw.answers(events(*[piece({"content": "x" * 1000})] * 200), STREAM, cut=5000)
        status, answer, _ = await post(rig, stream=True)
        assert status in (200, 502)  # as the first piece that came is small or not
        assert b"more than 100,000 bytes" in answer[-500:]
        assert (await rig.span()).status == "Error"


async def test_policy_tokens_still_train(rig):
    """The control: an ordinary call has no flaw."""
    await rig.client.chat.completions.create(**ASKED)
    span = await rig.span()
    assert semconv.UNTRAINABLE not in span.attributes
    assert span.response_token_ids == int32(ids("a b"))
