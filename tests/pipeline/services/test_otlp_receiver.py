"""OTLP/HTTP into the gateway: from an agent's own process to a triplet, and the protocol's answers."""

import asyncio
import gzip
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from factories import span, task
from gateway_rig import Client, serving
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from examples.sink.otlp import to_otlp
from millstream.consumers.adapter.adapter import Adapter
from millstream.consumers.log.read_to_end import read_to_end
from millstream.consumers.runner.runner import Runner
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.services import otlp_receiver
from millstream.pipeline.services.gateway import GatewayPolicy
from millstream.pipeline.services.otlp_receiver import OtlpPolicy
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.producers.log.port import Producer
from millstream.producers.tasks import TaskLine, TaskPublisher, group_of
from millstream.schemas.attempt_keys import attempt_key
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import LogUnavailable
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutEnd, Span, Triplet

MakeSettings = Callable[..., Settings]
pytestmark = pytest.mark.kafka
ANYWHERE = "http://127.0.0.1:0"
PROTOBUF = "application/x-protobuf"
AGENT = """
import os, subprocess, sys
import millstream as ms

def agent(task):
    subprocess.run([sys.executable, "-P", "foreign.py"], env=os.environ | ms.attempt_environment(), check=True)
"""
# Knows OpenTelemetry and nothing of us.
FOREIGN = """
import json, os
from urllib.request import Request, urlopen
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(compression=Compression.Gzip)))
tracer = provider.get_tracer("foreign")
parent = TraceContextTextMapPropagator().extract({"traceparent": os.environ["TRACEPARENT"]})
for question, right in (("one", 0.25), ("two", 1.0)):
    with tracer.start_as_current_span("chat m", parent, attributes={"gen_ai.operation.name": "chat"}) as span:
        headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
        asked = json.dumps({"model": "m", "messages": [{"role": "user", "content": question}]}).encode()
        with urlopen(Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", asked, headers)) as answer:
            span.set_attribute("gen_ai.response.id", json.load(answer)["id"])
    with tracer.start_as_current_span("judged", parent, attributes={
        "gen_ai.operation.name": "evaluation",
        "gen_ai.evaluation.name": "right",
        "gen_ai.evaluation.score.value": right,
    }):
        pass
provider.shutdown()
"""


async def model(request: web.Request) -> web.Response:
    question = (await request.json())["messages"][0]["content"]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": question},
        "finish_reason": "stop",
        "logprobs": {"content": [{"token": question, "logprob": -0.5}]},
        "token_ids": [7],
    }
    return web.json_response({"id": question, "model": "m", "choices": [choice], "prompt_token_ids": [1, 2]})


async def records(client: Client, topic: str, kind: Any) -> list[Any]:
    partitions = [Partition(topic, n) for n in range(client.settings.topics.partitions)]
    found = [r async for r in read_to_end(client.log, partitions)]
    return [codec.decode(r.value) for r in found if codec.type_of(r.value) is kind]


async def test_what_an_agents_own_process_exports_becomes_triplets_with_its_rewards(
    kafka_settings: MakeSettings, tmp_path: Path
) -> None:
    (tmp_path / "my_agent.py").write_text(AGENT)
    (tmp_path / "foreign.py").write_text(FOREIGN)
    served = web.Application()
    served.add_routes([web.post("/v1/chat/completions", model)])
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(serving(kafka_settings(proxy_secret="secret" * 6, gateway_token="t")))
        model_url = await stack.enter_async_context(serve(served, ANYWHERE))
        proxy = Proxy(client.log, client.settings.model_copy(update={"model_url": model_url}))
        urls = {"gateway_url": client.url, "proxy_url": await stack.enter_async_context(serve(proxy.app, ANYWHERE))}
        settings = client.settings.model_copy(update=urls)
        topics, stop = settings.topics, asyncio.Event()
        runner = Runner(client.log, settings, "my_agent:agent", folder=tmp_path, drain_s=0)
        adapter = Adapter(client.log, topics, transactional_id=f"{topics.prefix}.adapter.0")
        roles = [asyncio.create_task(role.run(stop)) for role in (runner, adapter)]
        await TaskPublisher(client.producer, settings).publish(group_of(TaskLine(input={}), settings))
        try:
            async with asyncio.timeout(60):
                while not (ends := await records(client, topics.triplets, RolloutEnd)):
                    assert not any(role.done() for role in roles), roles
                    await asyncio.sleep(0.1)
        finally:
            stop.set()
            await asyncio.gather(*roles, return_exceptions=True)
        assert [(e.status, e.reward, e.turns, e.trainable, e.reason) for e in ends] == [
            ("succeeded", 1.25, 2, True, None)
        ]
        triplets = await records(client, topics.triplets, Triplet)
        assert [(json.loads(t.response)["content"], t.reward, t.trainable) for t in triplets] == [
            ("one", 0.25, True),
            ("two", 1.0, True),
        ]
        spans = await records(client, topics.events, Span)
        (root,) = [s for s in spans if s.source == semconv.SOURCE_AGENT]
        exported = [s for s in spans if s.source == semconv.SOURCE_OTLP]
        found = [(s.trace_id, s.parent_id, s.scope_name) for s in exported]
        assert found == [(root.trace_id, root.span_id, "foreign")] * 4


async def post(client: Client, body: bytes, **headers: str) -> tuple[int, bytes, Any]:
    given = {"Content-Type": PROTOBUF} | {name.replace("_", "-"): value for name, value in headers.items()}
    async with client.http.post("/v1/traces", data=body, headers=given) as answer:
        return answer.status, await answer.read(), answer.headers


def a_request(**fields: Any) -> tuple[Span, ExportTraceServiceRequest]:
    one = span(task(), "a", trace_id="1" * 32, **fields)
    return one, to_otlp([one])


def bearer(of: Span) -> str:
    return f"Bearer {attempt_key('secret' * 6, of.rollout_id, of.attempt_id, valid_s=60.0)}"


async def test_spans_need_the_key_of_their_attempt_or_the_token(kafka_settings: MakeSettings) -> None:
    async with serving(kafka_settings(proxy_secret="secret" * 6, gateway_token="t")) as client:
        one, request = a_request()
        body = request.SerializeToString()
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": bearer(a_request()[0])}):
            http_status, answer, _ = await post(client, body, **headers)
            assert (http_status, Status.FromString(answer).message != "") == (401, True)
        for authorization in (bearer(one), "Bearer t"):
            http_status, answer, _ = await post(client, body, Authorization=authorization)
            assert (http_status, ExportTraceServiceResponse.FromString(answer)) == (200, ExportTraceServiceResponse())
        stored = await records(client, client.settings.topics.events, Span)
        assert [(s.rollout_id, s.source) for s in stored] == [(one.rollout_id, "otlp")] * 2
    async with serving(kafka_settings()) as client:  # without a token it is open to this machine
        assert (await post(client, body))[0] == 200
        assert (await post(client, body, Host="rebound.example:8600"))[0] == 403
        http_status, answer, _ = await post(client, body, Authorization=bearer(one))
        assert (http_status, "proxy_secret" in Status.FromString(answer).message) == (401, True)


async def test_spans_without_an_attempt_and_too_large_ones_are_counted_with_the_reason(client: Client) -> None:
    one, request = a_request()
    _, large = a_request(name="large", attributes={f"text{n}": "x" * (200 << 10) for n in range(6)})
    request.MergeFrom(large)
    stray = request.resource_spans.add().scope_spans.add().spans.add(name="stray", trace_id=b"1" * 16, span_id=b"1" * 8)
    assert stray.name == "stray"
    http_status, answer, _ = await post(client, gzip.compress(request.SerializeToString()), Content_Encoding="gzip")
    partial = ExportTraceServiceResponse.FromString(answer).partial_success
    assert (http_status, partial.rejected_spans) == (200, 2)
    for part in ("'stray'", "millstream.rollout_id", "'large'", "max_record_bytes"):
        assert part in partial.error_message
    (stored,) = await records(client, client.settings.topics.events, Span)
    assert stored.span_id == one.span_id


async def test_json_is_answered_in_json(client: Client) -> None:
    attributes = [{"key": f"millstream.{name}_id", "value": {"stringValue": "x"}} for name in ("rollout", "attempt")]
    good = {"traceId": "1" * 32, "spanId": "2" * 16, "name": "n", "attributes": attributes}
    body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [good, {"name": "stray"}]}]}]}).encode()
    http_status, answer, headers = await post(client, body, Content_Type="application/json; charset=utf-8")
    assert (http_status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(answer)["partialSuccess"]["rejectedSpans"] == "1"
    (stored,) = await records(client, client.settings.topics.events, Span)
    assert (stored.rollout_id, stored.span_id) == ("x", "2" * 16)


async def test_unreadable_requests_are_refused(kafka_settings: MakeSettings) -> None:
    bomb = gzip.compress(bytes(10 << 20))
    refused: list[tuple[bytes, int, dict[str, str]]] = [
        (b"\xff", 400, {}),
        (b"{", 400, {"Content_Type": "application/json"}),
        (b"", 415, {"Content_Type": "text/plain"}),
        (b"", 415, {"Content_Encoding": "br"}),
        (b"plain", 400, {"Content_Encoding": "gzip"}),
        (gzip.compress(b"", mtime=0)[:-1], 400, {"Content_Encoding": "gzip"}),
        (bomb, 413, {"Content_Encoding": "gzip"}),
        (bytes(2 << 20), 413, {}),
    ]
    async with serving(kafka_settings(), GatewayPolicy(otlp=OtlpPolicy(max_body_bytes=1 << 20))) as client:
        for body, http_status, headers in refused:
            answered, answer, _ = await post(client, body, **headers)
            assert answered == http_status, (answer, headers)
            if not headers.get("Content_Type"):
                assert Status.FromString(answer).message


async def test_while_the_log_is_away_the_exporter_is_asked_to_retry(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*args: Any, **kwargs: Any) -> None:
        raise LogUnavailable("no broker answers")

    producer: Producer = client.producer
    with monkeypatch.context() as patched:
        patched.setattr(producer, "send", send)
        http_status, answer, headers = await post(client, a_request()[1].SerializeToString())
        assert (http_status, headers["Retry-After"]) == (503, "2")
        assert "no broker answers" in Status.FromString(answer).message
    assert (await post(client, a_request()[1].SerializeToString()))[0] == 200


async def test_idle_connections_with_any_word_as_a_key_do_not_stop_ingestion(kafka_settings: MakeSettings) -> None:
    """Section F3: the key is checked before a place is taken, and a body has to arrive."""
    policy = GatewayPolicy(otlp=OtlpPolicy(requests=2, body_s=0.5))
    async with serving(kafka_settings(proxy_secret="secret" * 6, gateway_token="t"), policy) as client:
        one, request = a_request()
        other = attempt_key("another secret", one.rollout_id, one.attempt_id, valid_s=60.0)
        expired = attempt_key("secret" * 6, one.rollout_id, one.attempt_id, valid_s=-600.0)
        claims, _, mac = bearer(one).rpartition(".")
        longer = ".".join([*claims.split(".")[:2], "9999999999", "", mac]).removeprefix("Bearer ")
        for key in ("x", "ms1", "ms1....", "a.b.c.d.e", "\u00e9", other, expired, longer):
            reader, writer = await promised(client, key)
            assert b" 401 " in await reader.readline(), key
            writer.close()
        slow = [await promised(client, bearer(one).removeprefix("Bearer ")) for _ in range(5)]
        assert (await post(client, request.SerializeToString(), Authorization=bearer(one)))[0] == 200
        for reader, writer in slow:
            assert b" 408 " in await reader.readline()
            writer.close()


async def promised(client: Client, key: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has sent the head of a request, and sends no body."""
    host, port = client.url.removeprefix("http://").rstrip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/traces HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
    writer.write(f"{head}Content-Type: {PROTOBUF}\r\nContent-Length: 99\r\n\r\n".encode())
    return reader, writer


async def test_a_body_is_unpacked_only_with_a_right_key(
    kafka_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(*args: Any) -> Any:
        raise AssertionError("it was read")

    monkeypatch.setattr(otlp_receiver, "_unpacked", unpack)
    async with serving(kafka_settings(proxy_secret="secret" * 6, gateway_token="t")) as client:
        for key in ("wrong", "ms1.1.9999999999..00"):
            answered, _, _ = await post(client, b"x", Authorization=f"Bearer {key}", Content_Encoding="gzip")
            assert answered == 401


async def test_a_span_of_another_attempt_costs_itself_only(kafka_settings: MakeSettings) -> None:
    async with serving(kafka_settings(proxy_secret="secret" * 6, gateway_token="t")) as client:
        one, request = a_request()
        another, more = a_request()
        request.MergeFrom(more)
        answered, answer, _ = await post(client, request.SerializeToString(), Authorization=bearer(one))
        partial = ExportTraceServiceResponse.FromString(answer).partial_success
        assert (answered, partial.rejected_spans, another.rollout_id in partial.error_message) == (200, 1, True)
        (stored,) = await records(client, client.settings.topics.events, Span)
        assert stored.rollout_id == one.rollout_id
