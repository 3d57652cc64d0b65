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


def read(found, *pieces, version="run.0.3"):
    """What is sent of a stream before its end. ``version``: in the header."""
    found.start(version)
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


@pytest.mark.parametrize("name", ["chat of OpenAI", "messages of Anthropic", "responses of OpenAI"])
def test_everything_before_the_end_is_passed_on_at_once(name):
    path, kind, data, end = STREAMS[name]
    found = relay(path, kind)
    for event in data.split(b"\n\n"):
        if end in event:
            break
        assert found.feed(event + b"\n\n") == event + b"\n\n"
    assert found.committed


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_pings_and_reasoning_of_a_policy_are_passed_on_before_the_first_token(path):
    found = relay(path)
    assert found.feed(b": ping\n\n") == b": ping\n\n"
    assert (found.begun, found.committed) == (False, False)
    for name in ("reasoning", "reasoning_content"):
        piece = HEAD | {"choices": [{"index": 0, "delta": {name: "hm"}, "finish_reason": None}]}
        assert b"hm" in found.feed(stream(piece, done=""))
    assert found.committed


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "completions"])  # they have no head
def test_a_head_that_has_been_sent_is_not_sent_again(name):
    """A stream that breaks between its head and its first token is retried, and its client gets one answer."""
    path, kind, data, _ = STREAMS[name]
    events = [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]
    whole = relay(path, kind)
    expected = read(whole, data) + whole.rest()
    found = relay(path, kind)
    sent = found.feed(events[0])
    found.restart()
    sent += read(found, data.replace(b"chatcmpl-1", b"chatcmpl-2").replace(b"msg_1", b"msg_2")) + found.rest()
    assert found.failure is None
    lines = [line for line in steady(sent).split(b"\n\n") if b"resp" not in line]
    if whole.translates or "Anthropic" in name or "responses" in name:
        assert lines == [line for line in steady(expected).split(b"\n\n") if b"resp" not in line]
    assert found.client_id() == whole.client_id()
    assert found.answer.message == whole.answer.message
    assert sent.count(b"message_start") == expected.count(b"message_start")
    assert sent.count(b"response.created") == expected.count(b"response.created")


def test_a_ping_before_a_broken_stream_is_not_its_head():
    found = relay("/v1/messages", "anthropic")
    found.feed(b": ping\n\n")
    found.restart()
    assert read(found, CLAUDE) + found.rest() == CLAUDE


def test_token_ids_and_versions_are_read_and_not_passed_on():
    found = relay()
    sent = read(found, CHAT) + found.rest()
    assert (found.answer.prompt_token_ids, found.answer.token_ids) == ([1, 2], [10, 11, 12])
    assert found.answer.logprobs == [-0.5] * 3
    assert found.version == "mixed"  # run.0.3 at the beginning, run.0.5 at the end
    assert b"token_ids" not in sent
    assert b"x-model-version" not in sent
    assert sent.endswith(b"data: [DONE]\n\n")


def test_which_version_made_which_tokens_is_noted_as_they_come():
    """CHAT names run.0.4 after its first token; the comment at its end names another one, which made none of them."""
    found = relay()
    read(found, CHAT.replace(b": x-model-version=run.0.5\n\n", b""))
    assert (found.version, found.versions) == ("mixed", ((0, "run.0.3"), (1, "run.0.4")))
    found = relay()
    read(found, CHAT)
    assert (found.version, found.versions) == ("mixed", ())


def test_versions_that_change_and_change_back_are_mixed():
    found = relay()
    read(found, stream(*[
        chat_piece("a", token=10), ": x-model-version=run.0.4\n\n", chat_piece(" b", token=11),
        ": x-model-version=run.0.3\n\n", chat_piece(" c", "stop", token=12), ": x-model-version=run.0.3\n\n",
    ]))  # fmt: skip
    assert (found.version, found.versions) == ("mixed", ((0, "run.0.3"), (1, "run.0.4"), (2, "run.0.3")))


def test_a_server_that_knows_the_version_of_each_token_is_believed():
    known = ': x-model-versions=[[0,"run.0.3"],[2,"run.0.4"]]\n\n'
    for said, expected in (
        (known, ((0, "run.0.3"), (2, "run.0.4"))),
        (known.replace("[2", "[3"), ((0, "run.0.3"), (1, "run.0.4"))),  # the answer has three tokens: what was noted
        (known.replace("]]", ""), ((0, "run.0.3"), (1, "run.0.4"))),
    ):
        found = relay()
        sent = read(found, CHAT.replace(b": x-model-version=run.0.5\n\n", said.encode()))
        assert (found.version, found.versions) == ("mixed", expected)
        assert b"x-model-version" not in sent + found.rest()


def test_a_whole_answers_versions_are_in_its_header():
    choice = {"index": 0, "message": {"role": "assistant", "content": "a b"}, "finish_reason": "stop"}
    body = json.dumps(HEAD | {"choices": [choice | {"token_ids": [10, 11]}]}).encode()
    for version, ranges, expected in (
        ("mixed", '[[0,"run.0.3"],[1,"run.0.4"]]', ((0, "run.0.3"), (1, "run.0.4"))),
        ("mixed", None, ()),
        ("mixed", "[[0", ()),
        ("mixed", '[[0,"run.0.3"],[2,"run.0.4"]]', ()),
        ("run.0.4", None, ((0, "run.0.4"),)),
        (None, None, ()),
    ):
        found = relay()
        found.start(version, ranges)
        found.whole(body, as_stream=False)
        assert (found.version, found.versions) == (version, expected)


def test_nothing_of_a_try_that_failed_is_in_the_versions_of_the_next():
    found = relay()
    found.start("run.0.1")
    found.feed(stream(chat_piece("", prompt_token_ids=[1]), ": x-model-version=run.0.2\n\n", done=""))
    found.restart()
    read(found, CHAT.replace(b"run.0.5", b"run.0.4"))
    assert found.versions == ((0, "run.0.3"), (1, "run.0.4"))


def test_a_stream_that_does_not_end_has_failed():
    for count, committed in ((1, False), (3, True)):
        found = relay()
        read(found, b"\n\n".join(CHAT.split(b"\n\n")[:count]) + b"\n\n")
        assert found.failure == Failure("the stream ended before the answer did")
        assert found.committed is committed


MALFORMED = [
    ("data: {broken\n\n", "the server streamed something that is not JSON"),
    ("data: []\n\n", "the server streamed something that is not JSON"),
    ('data: {"choices": 3}\n\n', "the answer has a form that /v1/chat/completions does not have"),
    ('data: {"choices": [null]}\n\n', "the answer has a form that /v1/chat/completions does not have"),
    ('data: {"choices": [{"delta": {"tool_calls": 5}}]}\n\n', "the answer has a form that"),
    ('data: {"choices": [{"delta": {}, "logprobs": {"content": [{}]}}]}\n\n', "the answer has a form that"),
    ('data: {"usage": [1], "choices": []}\n\n', "the answer has a form that"),
    ("data: " + "[" * 100_000 + "\n\n", "the server streamed something that is not JSON"),
]


@pytest.mark.parametrize(("event", "flaw"), MALFORMED)
def test_what_the_proxy_does_not_understand_passes_and_is_not_trained_on(event, flaw):
    """A fault of the parser never reaches the client of a server that speaks its protocol."""
    data = stream(chat_piece("a"), event, chat_piece(" b", "stop"))
    found = relay(kind="openai")
    assert read(found, data) + found.rest() == data
    assert found.failure is None
    assert found.answer.untrainable.startswith(flaw)
    assert found.answer.message["content"] == "a b"


@pytest.mark.parametrize(("event", "flaw"), [each for each in MALFORMED if 'choices": [{' in each[0]])
def test_a_policys_event_of_another_form_passes_and_is_not_trained_on(event, flaw):
    found = relay()
    sent = read(found, stream(chat_piece("a", token=10), event, chat_piece(" b", "stop", token=11)))
    assert found.failure is None
    assert json.loads(event[6:]).keys() <= json.loads(sse.data_of(sse.Events().feed(sent)[1])).keys()
    assert found.answer.untrainable.startswith(flaw)


def test_what_came_before_a_malformed_event_of_a_policy_counts_if_something_was_sent():
    message = "the server streamed something that is not JSON"
    first, second = chat_piece("a"), [chat_piece(" b"), "data: {broken\n\n", chat_piece(" c")]
    found = relay()
    assert found.feed(stream(first, *second, done="")) == b""  # nothing has been sent: the call can be retried
    assert found.failure.message.startswith(message)
    found = relay()
    assert sse_text(found.feed(stream(first, done=""))) == "a"
    assert sse_text(found.feed(stream(*second, done=""))) == " b"
    assert found.failure.message.startswith(message)
    assert found.failure.broken
    found.end()
    assert found.failure.message.startswith(message)


def test_an_event_without_an_end_fails():
    found = relay()
    data = b"data: " + b"x" * sse.MAX_EVENT
    assert found.feed(data) == b""
    assert "more than" in found.failure.message
    external = relay(kind="openai")
    sent = external.feed(data) + external.feed(b"x\n\n")
    external.end()
    assert sent + external.rest() == data + b"x\n\n"
    assert (external.failure, "more than" in external.answer.untrainable) == (None, True)


ERROR = 'data: {"error": {"message": "out of memory"}}\n\n'


def test_an_error_of_a_policy_is_a_failure_and_that_of_another_server_the_end():
    events = [chat_piece("a", token=10, prompt_token_ids=[1]), ERROR]
    policy = relay()
    assert b"out of memory" not in read(policy, stream(*events))
    assert policy.failure == Failure("out of memory")
    external = relay(kind="openai")
    sent = read(external, stream(*events))
    assert sent == stream(events[0], done="")
    assert (external.failure, external.answer.error) == (None, "out of memory")
    assert sent + external.error("out of memory") == stream(*events)  # the server's own report
    (error,) = sse.Events().feed(external.error("the call could not be recorded"))
    assert error.startswith(b"event: error\n")
    assert json.loads(sse.data_of(error))["error"]["message"] == "the call could not be recorded"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_an_error_is_told_in_the_clients_protocol(path):
    found = relay(path)
    found.feed(stream(chat_piece("", prompt_token_ids=[1]), done=""))
    (error,) = sse.Events().feed(found.error("gone"))
    told = json.loads(sse.data_of(error))
    assert told["error"]["message"] == "gone"
    assert told.get("type") == (None if path == "/v1/chat/completions" else "error")


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
    assert found.versions == ((0, "run.0.3"), (2, "run.0.4"))
    assert b'"finish_reason":"stop"' in found.rest()


def sse_text(data):
    chunks = [json.loads(found) for event in sse.Events().feed(data) if (found := sse.data_of(event))]
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
        (b'{"choices": [{"message": {"content": "a"}, "finish_reason": "abort"}]}', "a weight update ended the call"),
    ],
)
def test_whole_answers_that_cant_be_used(body, message):
    found = relay(stream=False)
    found.whole(body, as_stream=False)
    assert found.failure.message.startswith(message)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"",
        b"[]",
        b'{"choices": 3}',
        b'{"choices": [null]}',
        b'{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{}]}}]}',
        b'{"usage": [1], "choices": []}',
        b"[" * 300_000,
    ],
)
def test_whole_answers_that_the_proxy_does_not_understand_pass(body):
    found = relay(kind="openai", stream=False)
    assert found.whole(body, as_stream=False) == body
    assert found.failure is None
    assert found.answer.untrainable
    if body.startswith(b"{"):
        policy = relay(stream=False)
        assert json.loads(policy.whole(body, as_stream=False)).keys() == json.loads(body).keys()
        assert policy.answer.untrainable
        claude = relay("/v1/messages", stream=False)
        claude.whole(body, as_stream=False)
        assert claude.failure is None or "in a form" in claude.failure.message
