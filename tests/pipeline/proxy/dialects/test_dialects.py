"""The answers of a dozen model servers, each replayed whole, as a stream, cut at every byte, with other line breaks,
compressed, and with pings: the client gets what it gets of the server itself, and the record is complete."""

import gzip
import json
import struct
import zlib

import anthropic
import pytest

from millstream.pipeline.protocols import sse
from millstream.pipeline.protocols.endpoints import ENDPOINTS, plan
from millstream.pipeline.proxy.relay import Relay
from millstream.schemas.spans import semconv
from tests.pipeline.proxy.dialects.raw_server import JSON, STREAM, served
from tests.pipeline.proxy.dialects.streams import ASKED, CALLS, DIALECTS, TEXT, THOUGHT, TOOLS


def direct(raw, client):
    if isinstance(client, anthropic.AsyncAnthropic):
        return client.with_options(base_url=raw.url)
    return client.with_options(base_url=raw.url + "/v1")


def asked(client, path, *, stream):
    found = {**ASKED, "stream": stream}
    if isinstance(client, anthropic.AsyncAnthropic):
        tools = [{"name": "weather", "input_schema": {"type": "object"}}]
        return {**found, "max_tokens": 100, "tools": tools}
    if path == "/v1/responses":
        function = {"type": "function", **TOOLS[0]["function"]}
        return {"model": ASKED["model"], "input": ASKED["messages"], "tools": [function], "stream": stream}
    return found


async def got(client, path, *, stream):
    """What the SDK makes of an answer: the whole of it, or each event."""
    call = {
        "/v1/messages": lambda: client.messages.create,
        "/v1/responses": lambda: client.responses.create,
        "/v1/chat/completions": lambda: client.chat.completions.create,
    }[path]()
    answer = await call(**asked(client, path, stream=stream))
    if not stream:
        return answer.model_dump()
    return [event.model_dump() async for event in answer]


def without_tokens(value):
    """What a policy's client did not ask for is not passed on."""
    if isinstance(value, list):
        return [without_tokens(each) for each in value if not isinstance(each, dict) or each.get("choices") != []]
    if not isinstance(value, dict):
        return value
    hidden = ("token_ids", "prompt_token_ids", "logprobs", "usage")
    return {name: without_tokens(each) for name, each in value.items() if name not in hidden}


def check_record(dialect, message, reasons, flaw, usage):
    assert content(message) == TEXT
    assert (THOUGHT in json.dumps(message)) is dialect.thinks
    calls = [
        (each["id"], each["function"]["name"], json.loads(each["function"]["arguments"]))
        for each in message.get("tool_calls") or ()
    ]
    assert calls == (CALLS if dialect.calls else [])
    assert reasons == [dialect.reason]
    assert flaw == dialect.flaw
    assert usage == ((7, 5) if dialect.flaw is None else (None, None))


def content(message):
    found = message["content"]
    return found if isinstance(found, str) else "".join(part.get("text", "") for part in found)


def changed(body, *, stream):
    """The same answer in other bytes: the body, its encoding, and how it is cut."""
    deflate = zlib.compressobj(wbits=-15)
    pings = b": ping\n\n" + body.replace(b"\n\n", b"\n\n: ping\n\n") if stream else b"\n \n" + body
    return {
        "as it is": (body, "", None),
        "CRLF": (body.replace(b"\n", b"\r\n"), "", None),
        "gzip": (gzip.compress(body), "gzip", 1000),
        "deflate": (zlib.compress(body), "deflate", 7),
        "raw deflate": (deflate.compress(body) + deflate.flush(), "deflate", 100),
        "pings": (pings, "", None),
        "small pieces": (body, "", 3),
    }


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("form", ["whole", "stream"])
async def test_a_client_gets_what_it_gets_of_the_server_itself(name, form):
    dialect, stream = DIALECTS[name], form == "stream"
    changes = changed(dialect.stream if stream else dialect.whole, stream=stream)
    async with served(dialect.kind) as (raw, rig):
        client = rig.claude if dialect.path == "/v1/messages" else rig.client
        for change, (body, encoding, cut) in changes.items():
            raw.answers(body, STREAM if stream else JSON, encoding=encoding, cut=cut)
            expected = await got(direct(raw, client), dialect.path, stream=stream)
            found = await got(client, dialect.path, stream=stream)
            if dialect.kind == "vllm":
                expected, found = without_tokens(expected), without_tokens(found)
            assert found == expected, change
            if dialect.kind != "vllm":
                assert raw.bodies[-1] == raw.bodies[-2]  # byte by byte
        spans = await rig.spans()
    assert len(spans) == len(changes)
    for span in spans:
        check_span(dialect, span, stream=stream)


def check_span(dialect, span, *, stream):
    message, attributes = json.loads(span.attributes[semconv.RESPONSE_MESSAGE]), span.attributes
    usage = tuple(
        int(attributes[n]) if n in attributes else None for n in (semconv.INPUT_TOKENS, semconv.OUTPUT_TOKENS)
    )
    if dialect.flaw is not None and not stream:  # only the stream lacks the rest
        usage, reason, flaw = (None, None), [None], dialect.flaw
    else:
        reason, flaw = json.loads(attributes[semconv.FINISH_REASONS]), attributes.get(semconv.UNTRAINABLE)
    check_record(dialect, message, reason, flaw, usage)
    assert span.status == "Ok"
    if dialect.tokens:
        assert span.response_token_ids == struct.pack("<5i", *dialect.tokens)
        assert len(span.response_logprobs) == len(span.response_token_ids)


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_stream_is_the_same_wherever_it_is_cut(name, end):
    dialect = DIALECTS[name]
    data = dialect.stream.replace(b"\n", end)
    made = plan(ENDPOINTS[dialect.path], {**ASKED, "stream": True}, dialect.kind)

    def relayed(pieces):
        relay = Relay(made, "the server", trainable=dialect.kind == "vllm")
        relay.start(None)
        sent = b"".join([relay.feed(piece) for piece in pieces])
        relay.end()
        assert relay.failure is None
        return sent + relay.rest(), relay.answer

    expected, answer = relayed([data])
    if dialect.kind != "vllm":
        assert expected == data
    usage = (answer.prompt_tokens, answer.completion_tokens)
    check_record(dialect, answer.message, answer.finish_reasons, answer.untrainable, usage)
    one_by_one = [data[at : at + 1] for at in range(len(data))]
    assert relayed(one_by_one) == (expected, answer)
    for at in range(1, len(data), 7 if end == b"\n" else 31):
        assert relayed([data[:at], data[at:]]) == (expected, answer), at


@pytest.mark.parametrize("name", [name for name, each in DIALECTS.items() if each.path != "/v1/messages"])
@pytest.mark.parametrize("form", ["whole", "stream"])
async def test_anthropics_client_gets_the_same_of_every_server(name, form):
    dialect, stream = DIALECTS[name], form == "stream"
    async with served(dialect.kind) as (raw, rig):
        whole = not stream or dialect.kind == "vllm"  # a policy's stream with tools is asked for whole
        raw.answers(dialect.whole if whole else dialect.stream, JSON if whole else STREAM)
        request = asked(rig.claude, "/v1/messages", stream=stream)
        request.pop("stream")
        if stream:
            async with rig.claude.messages.stream(**request) as events:
                message = await events.get_final_message()
        else:
            message = await rig.claude.messages.create(**request)
        span = await rig.span()
    blocks = [(block.type, block) for block in message.content]
    kinds = ["thinking"] * dialect.thinks + ["text"] + ["tool_use"] * len(CALLS) * dialect.calls
    assert [kind for kind, _ in blocks] == kinds
    assert "".join(block.text for kind, block in blocks if kind == "text") == TEXT
    assert "".join(block.thinking for kind, block in blocks if kind == "thinking") == (
        THOUGHT if dialect.thinks else ""
    )
    calls = [(block.id, block.name, block.input) for kind, block in blocks if kind == "tool_use"]
    assert calls == (CALLS if dialect.calls else [])
    assert message.stop_reason == ("tool_use" if dialect.calls else "end_turn")
    assert span.attributes[semconv.RESPONSE_ID] == message.id


@pytest.mark.parametrize("name", [name for name, each in DIALECTS.items() if each.path != "/v1/messages"])
@pytest.mark.parametrize("form", ["whole", "stream"])
async def test_the_responses_client_gets_the_same_of_every_server(name, form):
    dialect, stream = DIALECTS[name], form == "stream"
    kind = "vllm" if dialect.kind == "vllm" else "anthropic"  # neither has a responses interface: it is translated
    async with served(kind) as (raw, rig):
        whole = not stream or dialect.kind == "vllm"
        raw.answers(dialect.whole if whole else dialect.stream, JSON if whole else STREAM)
        request = asked(rig.client, "/v1/responses", stream=stream)
        request.pop("stream")
        if stream:
            async with rig.client.responses.stream(**request) as events:
                response = await events.get_final_response()
        else:
            response = await rig.client.responses.create(**request)
    assert response.output_text == TEXT
    thoughts = [part.text for item in response.output if item.type == "reasoning" for part in item.content]
    assert "".join(thoughts) == (THOUGHT if dialect.thinks else "")
    calls = [(c.call_id, c.name, json.loads(c.arguments)) for c in response.output if c.type == "function_call"]
    assert calls == (CALLS if dialect.calls else [])


def test_each_dialect_has_events():
    for dialect in DIALECTS.values():
        assert len(sse.Events().feed(dialect.stream)) > 4
