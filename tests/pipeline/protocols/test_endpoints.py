"""How a request is put to each kind of server."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.pipeline.protocols.endpoints import CHAT, ENDPOINTS, plan
from millstream.pipeline.protocols.openai import BadRequest

SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5)
NAMES = st.sampled_from(
    [
        *("model", "messages", "input", "prompt", "tools", "tool_choice", "system", "n", "stream", "stream_options"),
        *("text", "reasoning", "instructions", "content", "role", "type", "thinking", "logprobs"),
    ]
)
PARTS = st.recursive(
    SCALARS | st.sampled_from(["message", "text", "tool_use", "tool_result", "function", "image", "function_call"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
)
SAY = [{"role": "user", "content": "say one"}]


@pytest.mark.parametrize("kind", ["vllm", "openai", "anthropic"])
@pytest.mark.parametrize("path", ENDPOINTS)
@given(asked=st.dictionaries(NAMES, PARTS, max_size=6))
def test_any_request_has_a_plan_or_is_refused(path, kind, asked):
    try:
        made = plan(ENDPOINTS[path], asked, kind)
    except BadRequest:
        return
    made.reader()
    made.writer()
    assert made.path.startswith("/v1/")
    assert isinstance(made.messages, list)


@pytest.mark.parametrize(
    ("path", "kind", "asked_at", "translated"),
    [
        ("/v1/chat/completions", "vllm", "/v1/chat/completions", True),  # what the client did not ask for is left out
        ("/v1/chat/completions", "openai", "/v1/chat/completions", False),
        ("/v1/completions", "vllm", "/v1/completions", True),
        ("/v1/responses", "openai", "/v1/responses", False),
        ("/v1/responses", "vllm", "/v1/chat/completions", True),
        ("/v1/responses", "anthropic", "/v1/chat/completions", True),
        ("/v1/messages", "anthropic", "/v1/messages", False),
        ("/v1/messages", "openai", "/v1/chat/completions", True),
        ("/v1/embeddings", "vllm", "/v1/embeddings", False),
    ],
)
def test_a_server_is_asked_in_the_clients_protocol_or_for_chat(path, kind, asked_at, translated):
    made = plan(ENDPOINTS[path], {"model": "m", "messages": SAY, "input": SAY, "prompt": "x"}, kind)
    assert (made.path, made.writer() is not None) == (asked_at, translated)
    assert made.request.get("return_token_ids", False) is (kind == "vllm" and path != "/v1/embeddings")


@pytest.mark.parametrize(("path", "kind"), [("/v1/completions", "anthropic"), ("/v1/embeddings", "anthropic")])
def test_what_a_server_does_not_have_is_refused(path, kind):
    with pytest.raises(BadRequest, match=f"the server of model 'm' has no {path}"):
        plan(ENDPOINTS[path], {"model": "m"}, kind)


@pytest.mark.parametrize(("tool_choice", "rechunk"), [("auto", True), ("none", False)])
def test_a_policys_stream_with_tools_is_asked_for_whole(tool_choice, rechunk):
    asked = {"messages": SAY, "stream": True, "tools": [{"type": "function"}], "tool_choice": tool_choice}
    made = plan(CHAT, asked, "vllm")
    assert (made.rechunk, bool(made.request.get("stream"))) == (rechunk, not rechunk)
