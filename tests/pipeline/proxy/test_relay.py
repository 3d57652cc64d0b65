"""Answers on their way to the client, whole or cut at every byte."""

import json

import pytest

from millstream.pipeline.protocols import sse
from millstream.pipeline.protocols.endpoints import ENDPOINTS, plan
from millstream.pipeline.proxy.relay import Failure, Relay

SAY = [{"role": "user", "content": "say a b c"}]
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
DONE = "data: [DONE]\n\n"


def stream(*events, done=DONE):
    """Events as a server sends them: text as it is, anything else as JSON, with its type as the event's name."""
    parts = []
    for event in events:
        if isinstance(event, str):
            parts.append(event)
        else:
            name = f"event: {event['type']}\n" if "type" in event else ""
            parts.append(f"{name}data: {json.dumps(event)}\n\n")
    return "".join([*parts, done]).encode()


def chat_piece(text=None, reason=None, token=None, **more):
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": reason}
    if token is not None:
        choice |= {"token_ids": [token], "logprobs": {"content": [{"token": text, "logprob": -0.5}]}}
    return HEAD | {"choices": [choice], **more}


def text_piece(text, reason=None, token=None, **more):
    choice = {"index": 0, "text": text, "finish_reason": reason}
    if token is not None:
        logprobs = {"tokens": [text], "token_logprobs": [-0.5], "text_offset": [0]}
        choice |= {"token_ids": [token], "logprobs": logprobs}
    return HEAD | {"object": "text_completion", "choices": [choice], **more}


USAGE = {"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}
CHAT = stream(
    chat_piece("", prompt_token_ids=[1, 2]),
    ": ping\n\n",
    chat_piece("a", token=10),
    ": x-model-version=run.0.4\n\n",
    chat_piece(" b", token=11),
    chat_piece(" ç", token=12),
    chat_piece(reason="stop"),
    USAGE,
    ": x-model-version=run.0.5\n\n",
)
TEXT = stream(
    text_piece("a", token=10, prompt_token_ids=[1, 2]),
    text_piece(" b", token=11),
    text_piece(" ç", token=12),
    text_piece("", "stop"),
    USAGE,
)
CLAUDE = stream(
    {"type": "message_start", "message": {"id": "msg_1", "model": "c", "usage": {"input_tokens": 2}}},
    {"type": "ping"},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    *(
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
        for text in ("a", " b", " ç")
    ),
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
    {"type": "message_stop"},
    done="",
)
RESPONSE = stream(
    {"type": "response.created", "response": {"id": "resp_1"}},
    {"type": "response.output_item.added", "item": {"type": "message"}},
    *({"type": "response.output_text.delta", "delta": text} for text in ("a", " b", " ç")),
    {
        "type": "response.completed",
        "response": {
            "id": "resp_1",
            "status": "completed",
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "a b ç"}]}],
            "usage": {"input_tokens": 2, "output_tokens": 3},
        },
    },
    done="",
)
# Path, kind of server, its stream, and what the end of the client's stream begins with.
STREAMS = {
    "chat": ("/v1/chat/completions", "vllm", CHAT, b'"finish_reason":"stop"'),
    "chat of OpenAI": ("/v1/chat/completions", "openai", CHAT, b'"finish_reason": "stop"'),
    "completions": ("/v1/completions", "vllm", TEXT, b'"finish_reason":"stop"'),
    "messages": ("/v1/messages", "vllm", CHAT, b"message_delta"),
    "messages of Anthropic": ("/v1/messages", "anthropic", CLAUDE, b"message_delta"),
    "responses": ("/v1/responses", "vllm", CHAT, b"response.completed"),
    "responses of OpenAI": ("/v1/responses", "openai", RESPONSE, b"response.completed"),
}


def relay(path="/v1/chat/completions", kind="vllm", **asked):
    prompt = {"/v1/responses": {"input": SAY}, "/v1/completions": {"prompt": "say a b c"}}.get(path, {"messages": SAY})
    asked = {"model": "m", "stream": True, **prompt, **asked}
    return Relay(plan(ENDPOINTS[path], asked, kind), "the server", trainable=kind == "vllm")


def read(found, *pieces):
    """What is sent of a stream before its end."""
    found.start("run.0.3")
    sent = b"".join([found.feed(piece) for piece in pieces])
    found.end()
    return sent


def steady(data):
    """Without what differs from run to run."""
    return b"\n".join(line for line in data.split(b"\n") if b"created_at" not in line)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_the_same_wherever_it_is_cut(name):
    path, kind, data, end = STREAMS[name]
    whole = relay(path, kind)
    sent, rest = read(whole, data), whole.rest()
    assert whole.failure is None
    assert end not in sent
    assert end in rest
    expected, answer = steady(sent + rest), whole.answer
    assert answer.message["content"] == "a b ç"
    assert (answer.prompt_tokens, answer.completion_tokens) == (2, 3)
    cuts = [[data[:at], data[at:]] for at in range(1, len(data))]
    for pieces in [[data[at : at + 1] for at in range(len(data))], *cuts]:
        found = relay(path, kind)
        before = read(found, *pieces)
        assert found.failure is None
        assert end not in before
        assert steady(before + found.rest()) == expected
        assert found.answer == answer
        assert found.version == whole.version


def test_what_a_client_of_the_servers_protocol_gets_are_the_servers_bytes():
    for name in ("chat of OpenAI", "messages of Anthropic", "responses of OpenAI"):
        path, kind, data, _ = STREAMS[name]
        found = relay(path, kind)
        assert read(found, data) + found.rest() == data


def test_nothing_is_sent_before_the_first_token():
    found = relay("/v1/chat/completions", "openai")
    events = CHAT.split(b"\n\n")
    for event in events[:2]:
        assert found.feed(event + b"\n\n") == b""
        assert (found.begun, found.sent) == (False, False)
    assert found.feed(events[2] + b"\n\n") == b"\n\n".join(events[:3]) + b"\n\n"
    assert (found.begun, found.sent) == (True, True)


def test_token_ids_and_versions_are_read_and_not_passed_on():
    found = relay()
    sent = read(found, CHAT) + found.rest()
    assert (found.answer.prompt_token_ids, found.answer.token_ids) == ([1, 2], [10, 11, 12])
    assert found.answer.logprobs == [-0.5] * 3
    assert found.version == "mixed"  # run.0.3 at the beginning, run.0.5 at the end
    assert b"token_ids" not in sent
    assert b"x-model-version" not in sent
    assert sent.endswith(b"data: [DONE]\n\n")


def test_a_stream_that_does_not_end_has_failed():
    for count, sent in ((1, False), (3, True)):
        found = relay()
        read(found, b"\n\n".join(CHAT.split(b"\n\n")[:count]) + b"\n\n")
        assert found.failure == Failure("the stream ended before the answer did")
        assert found.sent is sent


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("data: {broken\n\n", "the server streamed something that is not JSON"),
        ("data: []\n\n", "the server streamed something that is not JSON"),
        ('data: {"choices": 3}\n\n', "the server answered in a form that /v1/chat/completions does not have"),
    ],
)
def test_what_came_before_a_malformed_event_counts_if_something_was_sent(event, message):
    first, second = stream(chat_piece("a"), done=""), stream(chat_piece(" b"), event, chat_piece(" c"), done="")
    found = relay(kind="openai")
    assert found.feed(first + second) == b""  # nothing has been sent: the call can be retried
    assert found.failure.message.startswith(message)
    found = relay(kind="openai")
    assert found.feed(first) == first
    assert found.feed(second) == stream(chat_piece(" b"), done="")
    assert found.failure.message.startswith(message)
    assert found.failure.broken
    found.end()
    assert found.failure.message.startswith(message)


def test_an_event_without_an_end_fails():
    found = relay()
    assert found.feed(b"data: " + b"x" * sse.MAX_EVENT) == b""
    assert "more than" in found.failure.message


ERROR = 'data: {"error": {"message": "out of memory"}}\n\n'


def test_an_error_of_a_policy_is_a_failure_and_that_of_another_server_the_end():
    events = [chat_piece("a", token=10, prompt_token_ids=[1]), ERROR]
    policy = relay()
    assert b"out of memory" not in read(policy, stream(*events))
    assert policy.failure == Failure("out of memory")
    external = relay(kind="openai")
    assert read(external, stream(*events)) == stream(events[0], done="")
    assert (external.failure, external.answer.error) == (None, "out of memory")
    (error,) = sse.Events().feed(external.error("out of memory"))
    assert error.startswith(b"event: error\n")
    assert json.loads(sse.data_of(error))["error"]["message"] == "out of memory"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_an_error_is_told_in_the_clients_protocol_behind_what_came_early(path):
    found = relay(path)
    found.feed(stream(chat_piece("", prompt_token_ids=[1]), done=""))
    early, error = found.rest(), found.error("gone")
    assert b"gone" in error
    assert len(error) > len(b"gone")
    assert early[:20] == error[:20]


@pytest.mark.parametrize(
    ("first", "more", "failure"),
    [
        (False, {}, "a weight update ended the call"),  # retried
        (True, {}, "a weight update ended the call"),  # continued by another replica
        (True, {"presence_penalty": 0.5}, None),  # can't be continued: its end is the client's, too
    ],
)
def test_a_weight_update_ends_a_stream(first, more, failure):
    found = relay(**more)
    if first:
        assert found.feed(stream(chat_piece("a", token=10, prompt_token_ids=[1]), done=""))
    sent = read(found, stream(chat_piece(" b", "abort", token=11)))
    assert (found.failure and found.failure.message) == failure
    assert sent == b""
    if failure is None:
        assert b'"finish_reason":"abort"' in found.rest()
    else:
        assert not found.failure.broken


def test_another_server_goes_on_behind_what_was_sent():
    broken = stream(*[chat_piece("a", token=10, prompt_token_ids=[1, 2]), chat_piece(" b", token=11)], done="")
    found = relay()
    sent = read(found, broken)
    remainder = found.migrate()
    assert found.failure is None
    assert remainder.request["prompt"] == [1, 2, 10, 11]
    assert found.flush() == b""
    found.start("run.0.4")
    rest = stream(text_piece(" ç", token=12), text_piece("", "stop"), USAGE | {"usage": {"completion_tokens": 1}})
    sent += found.feed(rest)
    found.end()
    assert found.failure is None
    whole = relay()
    assert sse_text(sent) == sse_text(read(whole, CHAT)) == "a b ç"
    assert (found.answer.token_ids, found.answer.completion_tokens) == ([10, 11, 12], 3)
    assert found.version == "mixed"
    assert b'"finish_reason":"stop"' in found.rest()


def sse_text(data):
    chunks = [json.loads(sse.data_of(event)) for event in sse.Events().feed(data)]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_nothing_goes_on_where_the_tokens_do_not_decide_what_comes():
    for kind, more in (("openai", {}), ("vllm", {"presence_penalty": 0.5})):
        found = relay(kind=kind, **more)
        read(found, stream(chat_piece("a", token=10, prompt_token_ids=[1]), done=""))
        assert found.migrate() is None


def test_whole_answers():
    choice = {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop", "token_ids": [10]}
    body = json.dumps({"id": "chatcmpl-1", "choices": [choice], "prompt_token_ids": [1]}).encode()
    assert relay(kind="openai", stream=False).whole(body, as_stream=False) == body
    policy = relay(stream=False)
    assert b"token_ids" not in policy.whole(body, as_stream=False)
    assert (policy.answer.token_ids, policy.client_id()) == ([10], "chatcmpl-1")
    claude = relay("/v1/messages")
    assert claude.whole(body, as_stream=True).endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert claude.client_id() == "msg_1"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "the server answered with something that is not a JSON object: b'<html>'"),
        (b'{"choices": 3}', "the server answered in a form that /v1/chat/completions does not have"),
        (b'{"choices": [{"message": {"content": "a"}, "finish_reason": "abort"}]}', "a weight update ended the call"),
    ],
)
def test_whole_answers_that_cant_be_used(body, message):
    found = relay(stream=False)
    found.whole(body, as_stream=False)
    assert found.failure.message.startswith(message)
