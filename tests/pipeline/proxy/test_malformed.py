"""Whatever a client asks and a server answers: the client gets an error that says so, and the call stays recorded."""

import json

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_server import Fault
from proxy_rig import rig_of

from millstream.pipeline.protocols.endpoints import ENDPOINTS, plan
from millstream.pipeline.protocols.openai import BadRequest

SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
NAMES = st.sampled_from(
    [
        "model",
        "messages",
        "input",
        "prompt",
        "tools",
        "tool_choice",
        "system",
        "n",
        "stream",
        "stream_options",
        "text",
        "reasoning",
        "instructions",
        "content",
        "role",
        "type",
        "thinking",
        "logprobs",
    ]
)
PARTS = st.recursive(
    SCALARS | st.sampled_from(["message", "text", "tool_use", "tool_result", "function", "image", "function_call"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
)


@pytest.mark.parametrize("kind", ["vllm", "openai", "anthropic"])
@pytest.mark.parametrize("path", ENDPOINTS)
@given(asked=st.dictionaries(NAMES, PARTS, max_size=6))
def test_any_request_has_a_plan_or_is_refused(path, kind, asked):
    try:
        made = plan(ENDPOINTS[path], asked, kind)
    except BadRequest:
        return
    assert made.path.startswith("/v1/")
    assert isinstance(made.messages, list)


@pytest.mark.parametrize(
    "body",
    [
        {"choices": 3},
        {"choices": [None]},
        {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{}]}}]},
        {"usage": [1], "choices": []},
    ],
)
async def test_an_answer_in_no_known_form_fails_the_call_and_is_recorded(body):
    async with rig_of(upstreams={"model": {"urls": ["{url}"], "timeout_s": 1.0}}) as rig:
        rig.model.faults.extend([Fault(200, body)] * 10)
        headers = {"Authorization": f"Bearer {rig.key}"}
        asked = {"model": "policy", "messages": [{"role": "user", "content": "say x"}]}
        url = f"{rig.base}/v1/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=asked, headers=headers) as response:
            assert response.status == 502
            assert "in a form" in json.loads(await response.text())["error"]["message"]
        assert (await rig.span()).status == "Error"
        assert await rig.close_attempt() == (200, {"spans": 1})
