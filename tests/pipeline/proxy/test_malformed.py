"""Malformed answers: the client gets an error that names the fault, and the call is recorded."""

import json

import aiohttp
import pytest
from policy_server import Fault
from proxy_rig import rig_of


@pytest.mark.parametrize(
    "body",
    [
        {"choices": 3},
        {"choices": [None]},
        {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{}]}}]},
        {"usage": [1], "choices": []},
    ],
)
async def test_a_malformed_answer_fails_the_call_and_is_recorded(body):
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
