"""What a client gets when a server refuses (in the client's protocol, without the server's key) or is malformed."""

import json

import aiohttp
import pytest
from policy_server import Fault
from proxy_rig import rig_of

from millstream.pipeline.protocols.endpoints import ENDPOINTS, plan
from millstream.pipeline.proxy.errors import refusal
from millstream.schemas.spans import semconv

ASKED = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
OPENAI = b'{"error": {"message": "wrong key sk-1", "type": "auth", "code": 7}}'


def refused(path, kind, body, key="sk-1"):
    message, text = refusal(plan(ENDPOINTS[path], ASKED, kind), 401, body, "the server answered 401", key)
    assert b"sk-1" not in text
    return message, json.loads(text)


def test_the_servers_own_body_goes_through_if_the_client_speaks_its_protocol():
    message, body = refused("/v1/chat/completions", "openai", OPENAI)
    assert (message, body) == ("wrong key …", {"error": {"message": "wrong key …", "type": "auth", "code": 7}})


def test_another_clients_error_is_translated():
    message, body = refused("/v1/messages", "openai", OPENAI)
    error = {"type": "error", "error": {"type": "authentication_error", "message": "wrong key …"}}
    assert (message, body) == ("wrong key …", error)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "the server answered 401"),
        (b"[]", "the server answered 401"),
        (b'{"error": null}', "the server answered 401"),
        (b'{"detail": "no"}', "no"),
        (b'{"message": "no"}', "no"),
        (b'{"error": "no"}', "no"),
    ],
)
def test_the_message_is_the_servers_if_it_gives_one(body, message):
    found, text = refused("/v1/chat/completions", "vllm", body, key="")
    assert found == text["error"]["message"] == message


@pytest.mark.parametrize(
    "body",
    [
        {"choices": 3},
        {"choices": [None]},
        {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{}]}}]},
        {"usage": [1], "choices": []},
    ],
)
async def test_a_malformed_answer_passes_and_is_recorded_as_untrainable(body):
    async with rig_of(upstreams={"model": {"urls": ["{url}"], "timeout_s": 1.0}}) as rig:
        rig.model.faults.append(Fault(200, body))
        headers = {"Authorization": f"Bearer {rig.key}"}
        asked = {"model": "policy", "messages": [{"role": "user", "content": "say x"}]}
        url = f"{rig.base}/v1/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=asked, headers=headers) as response:
            assert response.status == 200
            assert (await response.json()).keys() == body.keys()
        span = await rig.span()
        assert span.status == "Ok"
        assert "the answer has a form that" in span.attributes[semconv.UNTRAINABLE]
        assert await rig.close_attempt() == (200, {"spans": 1})
