"""What an agent, or anyone who reaches the proxy's port, might try. Over raw sockets, so that no client corrects it."""

import asyncio
import gzip
import json
import logging
import socket
import threading

import aiohttp
import openai
import pytest
from policy_server import Fault
from proxy_rig import ANYWHERE, SECRET, Rig, rig_of

from millstream.pipeline.proxy.app import ProxyPolicy, check_open
from millstream.pipeline.proxy.attempts import AttemptPolicy, Attempts
from millstream.pipeline.proxy.upstreams.replicas import ReplicaPolicy
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.attempt_keys import KEY_GRACE_S, BadKey, attempt_key, attempt_path, claims_of
from millstream.schemas.config.settings import load_settings
from millstream.schemas.config.upstreams import Limits
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import new_id
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec

ASKED = {"model": "policy", "messages": [{"role": "user", "content": "say one two three"}]}
BODY = json.dumps(ASKED).encode()
CHAT = "/v1/chat/completions"


async def raw(rig: Rig, data: bytes) -> tuple[int, bytes]:
    """The status of the first answer, and all that came until the proxy closed the connection."""
    reader, writer = await asyncio.open_connection(*rig.url.removeprefix("http://").split(":"))
    writer.write(data)
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]) if answer else 0, answer


def head(rig: Rig, target: str, *lines: str, method: str = "POST") -> bytes:
    fixed = (f"{method} {target} HTTP/1.1", "Host: x", f"Authorization: Bearer {rig.key}", "Connection: close")
    return "\r\n".join([*fixed, *lines, "", ""]).encode("latin-1")


def post(rig: Rig, target: str, *lines: str) -> bytes:
    return head(rig, target, *lines, f"Content-Length: {len(BODY)}") + BODY


# --- Paths


@pytest.mark.parametrize(
    "rest",
    [
        "/pause",
        "/collective_rpc",
        "//pause",
        "/v1/../pause",
        "/v1/%2e%2e/pause",
        "/v1/..%2fpause",
        "/v1/chat/completions/../../../pause",
        "/v1/chat/completions/../../pause",
        "/v1/chat/completions%2f..%2f..%2f..%2fpause",
        "/v1/chat/completions;/pause",
        "/v1/chat/completions\\..\\pause",
        "/v1/models/../../pause",
        "/V1/CHAT/COMPLETIONS",
        "/v1/chat/completions/",
        "/./pause",
        "/%70ause",
        "/update_weights",
        "/start_weight_update",
        "/v1/load_lora_adapter",
        "/tokenize",
        "/server_info",
    ],
)
async def test_only_the_endpoints_can_be_reached(rig, rest):
    status, _ = await raw(rig, post(rig, rig.base.removeprefix(rig.url) + rest))
    assert 400 <= status < 500
    assert rig.model.paths == []


@pytest.mark.parametrize(
    "path",
    [
        "/rollout/{other}/../{rollout}/attempt/{attempt}",
        "/rollout/{other}%2f..%2f{rollout}/attempt/{attempt}",
        "/rollout/{rollout}/attempt/{attempt}/../{other}",
        "/rollout/{rollout}/attempt/{attempt}%2f..%2f{other}",
        "/rollout/{rollout}%00/attempt/{attempt}",
        "/rollout/{rollout}/attempt/{attempt}%0d%0ax:y",
        "/../rollout/{other}/attempt/{attempt}",
        "/x/../rollout/{other}/attempt/{attempt}",
        "http://elsewhere/rollout/{other}/attempt/{attempt}",
    ],
)
async def test_a_disguised_path_does_not_lead_to_another_attempt(rig, path):
    path = path.format(rollout=rig.rollout, attempt=rig.attempt, other=new_id())
    status, _ = await raw(rig, post(rig, path + CHAT))
    assert 400 <= status < 500
    assert rig.model.requests == []
    assert await rig.spans() == []


# --- Requests that two servers might read in two ways


@pytest.mark.parametrize(
    "lines",
    [
        ("Transfer-Encoding: chunked", f"Content-Length: {len(BODY)}"),
        (f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"),
        (f"Content-Length: {len(BODY)}", "Content-Length: 5"),
        (f"Content-Length: {len(BODY)}", "Transfer-Encoding: xchunked"),
        (f"Content-Length: {len(BODY)}", "X-A: b\r\n folded: c"),
        (f"Content-Length: {len(BODY)}", "X-A : b"),
        (f"Content-Length: +{len(BODY)}",),
        ("Content-Length: -1",),
        (f"Content-Length: {len(BODY)}", "X-A: b\rX-B: c"),
        (f"Content-Length: {len(BODY)}", "X-A: b\x00c"),
    ],
)
async def test_ambiguous_requests_are_refused(rig, lines):
    target = rig.base.removeprefix(rig.url) + CHAT
    status, answer = await raw(rig, head(rig, target, *lines) + BODY)
    assert status == 400, answer
    assert answer.count(b"HTTP/1.") == 1
    assert rig.model.requests == []


async def test_a_malformed_request_is_logged_without_its_key(rig, caplog):
    target = rig.base.removeprefix(rig.url) + CHAT
    status, _ = await raw(rig, head(rig, target, f"x-api-key: {rig.key}\x00", "Content-Length: 0"))
    assert status == 400
    assert "malformed request from 127.0.0.1" in caplog.text
    assert rig.key not in caplog.text


async def test_forwarded_values_add_no_header(rig):
    """Forwarded values can't hold a line break, and the client's key and other headers are not forwarded."""
    lines = ("anthropic-beta: a%0d%0ax-smuggled: 1", "x-smuggled: 1", "traceparent: 00-\u00e9-1-1")
    seen = []
    original = rig.model._begin

    async def begin(request):
        seen.append(dict(request.headers))
        return await original(request)

    rig.model._begin = begin
    status, _ = await raw(rig, post(rig, rig.base.removeprefix(rig.url) + CHAT, *lines))
    assert status == 200
    (headers,) = seen
    assert "x-smuggled" not in {name.lower() for name in headers}
    assert rig.key not in json.dumps(headers)


# --- Keys


async def test_only_the_attempts_own_key_is_accepted(rig):
    other = attempt_key(SECRET, rig.rollout, new_id(), valid_s=60)
    expired = attempt_key(SECRET, rig.rollout, rig.attempt, valid_s=60, now=1000.0)
    forged = attempt_key("guess", rig.rollout, rig.attempt, valid_s=60)
    longer = rig.key.replace(rig.key.split(".")[2], str(int(rig.key.split(".")[2]) + 9999))
    for key in (other, expired, forged, longer, "", "x", "ms1....", "Bearer", rig.key + "x", rig.key[:-1]):
        with pytest.raises((openai.AuthenticationError, openai.APIConnectionError)) as refused:
            await rig.client.with_options(api_key=key or " ").chat.completions.create(**ASKED)
        assert SECRET not in str(refused.value)
    target = rig.base.removeprefix(rig.url) + CHAT
    noise = head(rig, target, f"Content-Length: {len(BODY)}").replace(rig.key.encode(), b"ms1.\xff\xfe.\xc3\xa9")
    assert (await raw(rig, noise + BODY))[0] == 401
    assert rig.model.requests == []
    await rig.client.chat.completions.create(**ASKED)  # refused calls do not lock the attempt out
    assert (await rig.close_attempt(other))[0] == 401


async def test_an_accepted_key_expires(rig):
    now = expires = float(rig.key.split(".")[1]) + 60.0 + KEY_GRACE_S
    rig.proxy._attempts._clock = lambda: now
    rig.proxy._attempts._monotonic = lambda: now
    now = expires - 1  # an attempt that ends late can still call
    await rig.client.chat.completions.create(**ASKED)
    now = expires + 1
    with pytest.raises(openai.AuthenticationError, match="has expired"):
        await rig.client.chat.completions.create(**ASKED)


async def test_a_shared_key_is_accepted_for_every_attempt():
    async with rig_of(proxy_shared_key="laptop") as rig:
        shared = rig.client.with_options(api_key="laptop")
        await shared.chat.completions.create(**ASKED)
        anywhere = openai.AsyncOpenAI(
            base_url=f"{rig.url}{attempt_path('my-run', '1')}/v1", api_key="laptop", max_retries=0
        )
        await anywhere.chat.completions.create(**ASKED)
        with pytest.raises(openai.AuthenticationError):
            await anywhere.with_options(api_key="laptop2").chat.completions.create(**ASKED)
        await rig.client.chat.completions.create(**ASKED)  # an attempt's own goes on to fit


async def test_without_a_secret_only_names_of_this_machine_are_answered():
    """Entry F4: a web page can make its own name resolve to loopback, but not send another name."""
    async with rig_of(proxy_secret="") as rig:
        rig.key = attempt_key("", rig.rollout, rig.attempt, valid_s=60.0)  # anybody can make it
        target = rig.base.removeprefix(rig.url)
        for host, expected in {
            "127.0.0.1:8400": 200,
            "localhost": 200,
            "LOCALHOST:1": 200,
            "[::1]:8400": 200,
            "evil.example": 403,
            "evil.example:8400": 403,
            "127.0.0.1.evil.example": 403,
            "localhost@evil.example": 403,
            "[::1": 403,
            "": 403,
        }.items():
            for request in (post(rig, target + CHAT), head(rig, target + "/v1/models", method="GET")):
                status, answer = await raw(rig, request.replace(b"Host: x", f"Host: {host}".encode()))
                assert status == expected or (status == 400 and expected == 403), (host, answer)
    async with rig_of() as rig:  # with a secret any name will do: the key decides
        assert (await raw(rig, post(rig, rig.base.removeprefix(rig.url) + CHAT)))[0] == 200


@pytest.mark.parametrize("resources_id", ["v1.2", "a.b.c.d", "ü", "a b/c%2e", "x" * 200])
async def test_any_id_of_resources_fits_into_a_key(rig, resources_id):
    """Entry F8: with a dot in it every call failed with 500."""
    key = attempt_key(SECRET, rig.rollout, rig.attempt, valid_s=60.0, resources_id=resources_id)
    assert claims_of(SECRET, rig.rollout, rig.attempt, key).resources_id == resources_id
    await rig.client.with_options(api_key=key).chat.completions.create(**ASKED)
    assert (await rig.span()).attributes[semconv.RESOURCES_ID] == resources_id


async def test_a_body_under_way_when_its_attempt_is_closed_is_not_asked(rig, monkeypatch):
    """Entry F5: its span would come behind the count."""
    reading, body = asyncio.Event(), rig.proxy._body

    async def reads(request):
        reading.set()
        return await body(request)

    monkeypatch.setattr(rig.proxy, "_body", reads)
    reader, writer = await asyncio.open_connection(*rig.url.removeprefix("http://").split(":"))
    request = post(rig, rig.base.removeprefix(rig.url) + CHAT)
    writer.write(request[:-10])
    await reading.wait()
    assert await rig.close_attempt() == (200, {"spans": 0})
    writer.write(request[-10:])
    async with asyncio.timeout(5):
        assert b" 410 " in await reader.readline()
    writer.close()
    assert rig.model.requests == []
    assert await rig.spans() == []


async def test_a_wrong_key_is_refused_before_the_body_is_read(rig):
    reader, writer = await asyncio.open_connection(*rig.url.removeprefix("http://").split(":"))
    request = post(rig, rig.base.removeprefix(rig.url) + CHAT).replace(rig.key.encode(), b"wrong")
    writer.write(request[: -len(BODY)])  # and none of its body
    async with asyncio.timeout(5):
        assert b" 401 " in await reader.readline()
    writer.close()


class Clocks:
    """A wall clock and a monotonic one, which a test moves."""

    def __init__(self):
        self.wall, self.monotonic = 1_000_000.0, 50.0

    def passes(self, seconds):
        self.wall += seconds
        self.monotonic += seconds

    def attempts(self, **options):
        return Attempts(SECRET, clock=lambda: self.wall, monotonic=lambda: self.monotonic, **options)

    def key(self, valid_s=600.0):
        return attempt_key(SECRET, "r", "a", valid_s=valid_s, now=self.wall)


@pytest.mark.parametrize("change", [-3600.0, -86_400.0, 3600.0])
async def test_a_wall_clock_that_jumps_changes_nothing(change):
    """Entry B5: after an hour back, no attempt of the next hour could be closed, and each was lost."""
    clocks = Clocks()
    attempts = clocks.attempts()
    clocks.passes(100)
    before = clocks.key()
    assert not attempts.may_have_lost_calls(attempts.authorised("r", "a", before))
    clocks.passes(10)
    clocks.wall += change
    attempt = attempts.authorised("r", "a", before)  # its key does not expire early
    assert not attempts.may_have_lost_calls(attempt)
    clocks.passes(10)
    attempts = clocks.attempts()  # a new process, from now on
    clocks.passes(1)
    assert not attempts.may_have_lost_calls(attempts.authorised("r", "a", clocks.key()))
    late = clocks.key()
    clocks.passes(600)
    attempts = clocks.attempts()
    assert attempts.may_have_lost_calls(attempts.authorised("r", "a", late))  # older than the process


async def test_closed_holds_as_long_as_the_key():
    """Entry F5: it held for an hour."""
    clocks = Clocks()
    attempts = clocks.attempts(limits=Limits(requests_per_minute=1))
    key = clocks.key(valid_s=6 * 3600)
    closed = attempts.authorised("r", "a", key)
    closed.closed, closed.spans = True, 7
    for _ in range(5):
        clocks.passes(3700)
        for n in range(10):
            attempts.authorised("r", f"b{n}", attempt_key(SECRET, "r", f"b{n}", valid_s=60, now=clocks.wall))
        assert attempts.authorised("r", "a", key) is closed
        assert len(attempts) <= 21  # and those that are over are forgotten
    clocks.passes(2 * 3600 + 4000)
    for n in range(30):
        attempts.authorised("r", f"c{n}", attempt_key(SECRET, "r", f"c{n}", valid_s=60, now=clocks.wall))
    with pytest.raises(BadKey, match="expired"):
        attempts.authorised("r", "a", key)


def test_the_number_of_calls_can_be_read_from_any_thread_under_load():
    """Entry F8: /metrics failed, because a dictionary changed while it was summed up."""
    attempts, over, errors = Clocks().attempts(), threading.Event(), []

    def scrape():
        while not over.is_set():
            try:
                assert attempts.in_flight >= 0
            except Exception as error:
                errors.append(error)
                return

    scraping = threading.Thread(target=scrape)
    scraping.start()
    for n in range(20_000):
        attempts.authorised("r", f"a{n}", attempt_key(SECRET, "r", f"a{n}", valid_s=60, now=1_000_000.0)).enter()
    over.set()
    scraping.join()
    assert errors == []
    assert attempts.in_flight == 20_000


def test_a_proxy_without_a_secret_serves_this_machine_only():
    check_open(load_settings(), "127.0.0.1")
    check_open(load_settings(proxy_secret="s" * 32), "0.0.0.0")
    with pytest.raises(ConfigError, match="MILLSTREAM_PROXY_SECRET"):
        check_open(load_settings(), "0.0.0.0")


# --- Too much, too slow


async def test_bodies_that_are_too_large_are_refused_compressed_or_not():
    async with rig_of(max_record_bytes=1 << 16) as rig:
        target = rig.base.removeprefix(rig.url) + CHAT
        large = json.dumps(ASKED | {"padding": "x" * (1 << 17)}).encode()
        bomb = gzip.compress(b'{"a": "' + bytes(64 << 20) + b'"}')
        assert len(bomb) < 1 << 17
        chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (large[:4096], large[4096:])) + b"0\r\n\r\n"
        for lines, body in (
            ((f"Content-Length: {len(large)}",), large),
            (("Transfer-Encoding: chunked",), chunked),
            ((f"Content-Length: {len(bomb)}", "Content-Encoding: gzip"), bomb),
        ):
            status, answer = await raw(rig, head(rig, target, *lines) + body)
            assert status == 413, answer
            assert b"max_record_bytes" in answer
        packed = gzip.compress(BODY)
        assert (await raw(rig, head(rig, target, f"Content-Length: {len(packed)}", "Content-Encoding: gzip") + packed))[
            0
        ] == 200
        deep = b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
        assert (await raw(rig, head(rig, target, f"Content-Length: {len(deep)}") + deep))[0] == 400
        assert len(rig.model.requests) == 1


async def test_a_body_that_does_not_come_is_refused():
    async with rig_of(policy=ProxyPolicy(body_s=0.2)) as rig:
        target = rig.base.removeprefix(rig.url) + CHAT
        reader, writer = await asyncio.open_connection(*rig.url.removeprefix("http://").split(":"))
        async with asyncio.timeout(5):
            writer.write(head(rig, target, f"Content-Length: {len(BODY)}") + BODY[:10])
            answer = await reader.readuntil(b"within 0 s")
        writer.close()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the request's body did not arrive" in answer
        assert rig.model.requests == []


async def test_a_connection_whose_head_does_not_come_is_closed(rig):
    async with serve(rig.model.app, ANYWHERE, head_s=0.3) as url:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        async with asyncio.timeout(10):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            assert await reader.read() == b""
        writer.close()


async def test_a_client_that_does_not_read_its_stream_blocks_no_other_and_is_cut_off():
    """What it does not read stays at the model server. At its deadline the call is cut off and recorded."""
    policy = ProxyPolicy(attempts=AttemptPolicy(last_calls_s=30.0))
    async with rig_of(policy=policy, upstreams={"model": {"urls": ["{url}"], "timeout_s": 4.0}}) as rig:
        loop = asyncio.get_running_loop()
        host, port = rig.url.removeprefix("http://").split(":")
        lazy = socket.socket()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.setblocking(False)
        await loop.sock_connect(lazy, (host, int(port)))
        words = ("x" * 40_000 + " ") * 300
        body = json.dumps({**ASKED, "stream": True, "messages": [{"role": "user", "content": f"say {words}"}]}).encode()
        target = rig.base.removeprefix(rig.url) + CHAT
        await loop.sock_sendall(lazy, head(rig, target, f"Content-Length: {len(body)}") + body)
        await rig.model.asked.wait()
        answer = await rig.client.chat.completions.create(**ASKED)  # others are served meanwhile
        assert answer.choices[0].message.content == "one two three"
        async with asyncio.timeout(30):
            assert await rig.close_attempt() == (200, {"spans": 2})
        lazy.close()
        errors = [span.status_message for span in await rig.spans() if span.status == "Error"]
        assert len(errors) == 1


# --- Secrets

UPSTREAM_KEY = "sk-upstream-3f9a"


async def test_no_secret_is_in_any_span_log_line_or_answer(monkeypatch, caplog):
    """A full run through all endpoints, with servers that repeat the key they were given."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("UPSTREAM_KEY", UPSTREAM_KEY)
    policy = ProxyPolicy(replicas=ReplicaPolicy(backoff_s=0.01))
    seen: list[str] = []
    kinds = {kind: {"urls": ["{url}"], "kind": kind, "key_env": "UPSTREAM_KEY"} for kind in ("vllm", "openai")}
    routes = {"policy": "vllm", "*": "openai"}
    async with rig_of(policy=policy, upstreams=kinds, routes=routes, proxy_shared_key="shared-5d") as rig:
        headers = {"Authorization": f"Bearer {rig.key}"}
        leaks = {"error": {"message": f"Incorrect API key provided: {UPSTREAM_KEY}", "type": "x"}}
        async with aiohttp.ClientSession(headers=headers) as session:

            async def ask(path, body):
                async with session.post(rig.base + path, json=body) as response:
                    seen.append(f"{response.headers} {await response.text()}")

            for model in ("policy", "other"):
                for stream in (False, True):
                    messages = {"model": model, "stream": stream, "messages": ASKED["messages"], "max_tokens": 5}
                    await ask(CHAT, messages)
                    await ask("/v1/messages", messages)
                    await ask("/v1/responses", {"model": model, "stream": stream, "input": "say a b"})
                    await ask("/v1/completions", {"model": model, "stream": stream, "prompt": "say a b"})
                    for status in (401, 500, 400):
                        rig.model.faults.extend([Fault(status, leaks)] * (6 if status == 500 else 1))
                        await ask(CHAT, messages)
                        rig.model.faults.clear()
                await ask("/v1/embeddings", {"model": model, "input": "x"})
                await ask("/v1/messages/count_tokens", {"model": model, "messages": ASKED["messages"]})
            for key in ("wrong", rig.key[:-2]):
                async with session.post(rig.base + CHAT, json=ASKED, headers={"x-api-key": key}) as response:
                    seen.append(await response.text())
            await ask("/close", {})
        spans = await rig.spans()
        assert len(spans) > 20
        seen += [codec.encode(span).decode("latin-1") for span in spans]
        seen += [record.getMessage() + (record.exc_text or "") for record in caplog.records]
        for secret in (UPSTREAM_KEY, SECRET, "shared-5d", rig.key, rig.key.rpartition(".")[2]):
            assert [text for text in seen if secret in text] == []
