"""Several replicas and upstreams: which one is asked, what is retried, and what the client never notices."""

import asyncio
import time
from dataclasses import replace

import openai
import pytest
from aiohttp import web
from policy_server import Fault, PolicyServer
from proxy_rig import ANYWHERE, SECRET, rig_of
from pydantic import SecretStr

from millstream.pipeline.addresses import free_port
from millstream.pipeline.proxy.app import ProxyPolicy
from millstream.pipeline.proxy.upstreams.replicas import Failed, ReplicaPolicy, Replicas, retry_after_s
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.producers.control import publish_control
from millstream.schemas.attempt_keys import attempt_key
from millstream.schemas.config.upstreams import Upstream
from millstream.schemas.control import Arm, RoutingTable
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import new_id
from millstream.schemas.spans import semconv

ASKED = {"model": "policy", "messages": [{"role": "user", "content": "say one"}]}


@pytest.mark.parametrize(
    "fault", [Fault(503), Fault(429), Fault(500), Fault(408), Fault(hang_up=True), Fault(abort_after=0)]
)
async def test_passing_failures_are_retried_and_the_call_is_recorded_once(rig, fault):
    rig.model.faults.append(fault)
    answer = await rig.client.chat.completions.create(**ASKED)
    assert answer.choices[0].message.content == "one"
    assert len(rig.model.requests) == 2
    assert (await rig.span()).status == "Ok"


async def test_retry_after_is_obeyed_and_passed_on_when_no_time_is_left():
    settings = {"upstreams": {"model": {"urls": ["{url}"], "timeout_s": 2.0}}}
    async with rig_of(**settings) as rig:
        rig.model.faults.append(Fault(429, headers={"Retry-After": "1"}))
        began = time.monotonic()
        await rig.client.chat.completions.create(**ASKED)
        assert time.monotonic() - began >= 1.0
        rig.model.faults.append(Fault(429, headers={"Retry-After": "60"}))
        with pytest.raises(openai.RateLimitError) as refused:
            await rig.client.chat.completions.create(**ASKED)
        assert refused.value.response.headers["Retry-After"] == "60"


async def test_a_dead_replica_is_left_alone_and_no_call_fails():
    async with rig_of(models=2) as rig:
        dead, alive = rig.models
        dead.faults.extend([Fault(hang_up=True)] * 1000)
        for _ in range(20):
            await rig.client.chat.completions.create(**ASKED)
        assert len(alive.requests) == 20
        assert len(dead.requests) <= ReplicaPolicy().failures
        assert {span.status for span in await rig.spans()} == {"Ok"}


async def test_an_unreachable_server_fails_the_call():
    async with rig_of(upstreams={"model": {"urls": ["http://127.0.0.1:9"], "timeout_s": 1.0}}) as rig:
        with pytest.raises(openai.InternalServerError, match="model can't be reached"):
            await rig.client.chat.completions.create(**ASKED)
        assert (await rig.span()).status == "Error"


QUICK = ReplicaPolicy(tries=4, backoff_s=0.01, cooldown_s=0.02)


async def test_calls_wait_while_their_policy_has_no_server(caplog):
    """As they do after the end of a trainer that serves the model itself."""
    address = f"http://127.0.0.1:{free_port()}"
    async with rig_of(policy=ProxyPolicy(replicas=QUICK), upstreams={"model": {"urls": [address]}}) as rig:
        calls = [asyncio.create_task(rig.client.chat.completions.create(**ASKED)) for _ in range(4)]
        done, _ = await asyncio.wait(calls, timeout=1.0)  # far longer than four tries take
        assert not done
        assert "is not used until its /health answers" in caplog.text
        async with serve(PolicyServer().app, address):
            assert {answer.choices[0].message.content for answer in await asyncio.gather(*calls)} == {"one"}
            assert {span.status for span in await rig.spans()} == {"Ok"}


async def test_a_server_that_stays_away_fails_the_call_at_last():
    policy = ProxyPolicy(replicas=replace(QUICK, away_s=0.1))
    async with rig_of(policy=policy, upstreams={"model": {"urls": [f"http://127.0.0.1:{free_port()}"]}}) as rig:
        with pytest.raises(openai.InternalServerError, match="model can't be reached"):
            await rig.client.chat.completions.create(**ASKED)


async def test_a_server_that_hangs_fails_the_call_at_its_deadline():
    async with rig_of(upstreams={"model": {"urls": ["{url}"], "timeout_s": 0.3}}) as rig:
        rig.model.gate.clear()
        with pytest.raises(openai.InternalServerError, match="did not answer in time"):
            await rig.client.chat.completions.create(**ASKED)
        rig.model.gate.set()


async def test_a_rollout_stays_with_its_replica_unless_that_is_overloaded():
    async with rig_of(models=3) as rig:
        for _ in range(6):
            await rig.client.chat.completions.create(**ASKED)
        assert sorted(len(model.requests) for model in rig.models) == [0, 0, 6]
        for model in rig.models:
            model.gate.clear()
        calls = [asyncio.create_task(rig.client.chat.completions.create(**ASKED)) for _ in range(12)]
        async with asyncio.timeout(5):
            await asyncio.gather(*(model.asked.wait() for model in rig.models))
        for model in rig.models:
            model.gate.set()
        await asyncio.gather(*calls)
        assert max(len(model.requests) for model in rig.models) <= 6 + 6


async def test_a_broken_replica_is_left_alone_for_longer_each_time_and_tried_by_one_call():
    now = 0.0
    replicas = Replicas("x", Upstream(urls=("http://a",), kind="openai"), SecretStr(""), clock=lambda: now)
    (replica,) = replicas.all
    for _ in range(ReplicaPolicy().failures):
        assert replicas.pick("r") is replica
        replicas.failed(replica, Failed("no"))
    assert replicas.pick("r") is None
    now = 1.1
    assert replicas.pick("r") is replica
    replica.trying = True
    assert replicas.pick("r") is None
    replica.trying = False
    replicas.failed(replica, Failed("no"))
    now = 2.5
    assert replicas.pick("r") is None  # two seconds this time
    now = 3.2
    replicas.succeeded(replica)
    assert replicas.pick("r") is replica
    replicas.failed(replica, Failed("busy", broken=False))
    assert replica.failures == 0


def test_retry_after_as_a_date():
    assert retry_after_s("3") == 3.0
    assert 58 < retry_after_s(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60
    assert retry_after_s("soon") == 0.0


async def test_models_go_where_the_routes_say_with_the_keys_of_the_proxy(monkeypatch, tmp_path):
    """Both kinds of server as their SDKs' users know them; the agent has neither key."""
    seen = {}

    async def openai_like(request):
        seen["openai"] = (request.headers["Authorization"], await request.json())
        return web.json_response({"error": {"message": "Incorrect API key: sk-secret-1"}}, status=401)

    async def anthropic_like(request):
        seen["anthropic"] = (request.headers["x-api-key"], request.headers["anthropic-version"], await request.json())
        usage = {"input_tokens": 3, "output_tokens": 1}
        content = [{"type": "text", "text": "hi"}]
        message = {"id": "msg_1", "type": "message", "role": "assistant", "content": content, "usage": usage}
        return web.json_response(message | {"model": "claude-x", "stop_reason": "end_turn"})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", openai_like), web.post("/v1/messages", anthropic_like)])
    monkeypatch.setenv("OPENAI_KEY", "sk-secret-1")
    (tmp_path / "key").write_text("sk-secret-2\n")
    async with serve(app, ANYWHERE) as url:
        upstreams = {
            "openai": {"urls": [url], "kind": "openai", "key_env": "OPENAI_KEY"},
            "anthropic": {"urls": [url], "kind": "anthropic", "key_file": str(tmp_path / "key")},
            "model": {"urls": ["{url}"], "strip_prefix": "local/"},
        }
        routes = {"gpt-*": "openai", "claude-*": "anthropic", "local/*": "model"}
        async with rig_of(upstreams=upstreams, routes=routes) as rig:
            with pytest.raises(openai.AuthenticationError) as refused:
                await rig.client.chat.completions.create(**ASKED | {"model": "gpt-5"})
            assert "sk-secret" not in str(refused.value)
            answer = await rig.claude.messages.create(model="claude-x", max_tokens=5, messages=ASKED["messages"])
            assert answer.content[0].text == "hi"
            await rig.client.chat.completions.create(**ASKED | {"model": "local/policy"})
            assert rig.model.requests[0]["model"] == "policy"
            with pytest.raises(openai.BadRequestError, match=r"unknown; known are gpt-\*"):
                await rig.client.chat.completions.create(**ASKED | {"model": "else"})
            spans = await rig.spans()
            assert [span.attributes[semconv.UPSTREAM] for span in spans] == ["openai", "anthropic", "model"]
            assert spans[1].attributes[semconv.RESPONSE_MESSAGE] == '{"role":"assistant","content":"hi"}'
            assert "sk-secret" not in repr(spans)
    assert seen["openai"][0] == "Bearer sk-secret-1"
    assert seen["anthropic"][0] == "sk-secret-2"
    assert seen["anthropic"][1]  # the version that the client speaks


async def test_versions_side_by_side_are_shared_by_rollouts_and_a_pinned_one_stays():
    async with rig_of() as rig:
        producer = rig.log.producer()

        async def publish(table):
            await publish_control(producer, rig.topics, table.to_control())
            await rig.proxy._control.wait_until_current()

        arms = [Arm(version=f"r.0.{n}", upstream="model", served_as=f"policy-{n}") for n in (1, 2)]
        table = RoutingTable().deploy("policy", arms[0]).deploy("policy", arms[1])
        await publish(table.split("policy", {"r.0.1": 0.5, "r.0.2": 0.5}))
        served = {}
        for _ in range(40):
            rollout, attempt = new_id(), new_id()
            key = attempt_key(SECRET, rollout, attempt, valid_s=60.0)
            base = f"{rig.url}/rollout/{rollout}/attempt/{attempt}/v1"
            client = rig.client.with_options(base_url=base, api_key=key)
            for _ in range(2):
                await client.chat.completions.create(**ASKED)
            names = {request["model"] for request in rig.model.requests[-2:]}
            served[rollout] = names
        assert all(len(names) == 1 for names in served.values())
        assert {name for names in served.values() for name in names} == {"policy-1", "policy-2"}
        await publish(table.rollback("policy"))
        await rig.client.chat.completions.create(**ASKED)
        assert rig.model.requests[-1]["model"] == "policy-1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routes": {"*": "nowhere"}}, r"routes.\*: there is no upstream 'nowhere'"),
        (
            {"upstreams": {"a": {"urls": ["{url}"]}, "b": {"urls": ["{url}"]}}, "routes": {}},
            "routes: several",
        ),
        ({"upstreams": {"a": {"urls": ["{url}"], "key_env": "NOT_SET"}}, "routes": {"*": "a"}}, "upstreams.a.*NOT_SET"),
        ({"upstreams": {"a": {"urls": ["host:1"]}}, "routes": {"*": "a"}}, "not an address"),
    ],
)
async def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        async with rig_of(**settings):
            pass
