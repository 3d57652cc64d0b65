"""One HTTP client, made before any attempt, serves all of them: a real server tells who called."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from aiohttp import web
from factories import task

import millstream as ms
from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.client_binding import bind_clients
from millstream.producers.agent.process_tracer import PLACEHOLDER_KEY, ProcessTracer
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.ids import new_id
from millstream.schemas.wire.records import Span

openai = pytest.importorskip("openai")

ATTEMPTS = 50


class Server:
    """Answers chat completions with what it was asked, and keeps who asked."""

    def __init__(self) -> None:
        self.url = ""
        self.anthropic: list[tuple[str, str]] = []  # attempt, bearer
        self.calls: list[tuple[str, str, str, str, str]] = []  # rollout, attempt, bearer, x-api-key, prompt
        self.parents: list[str] = []

    async def chat(self, request: web.Request) -> web.Response:
        prompt = (await request.json())["messages"][0]["content"]
        where, headers = request.match_info, request.headers
        self.calls.append(
            (where["rollout"], where["attempt"], headers["Authorization"], headers.get("x-api-key", ""), prompt)
        )
        self.parents += headers.get("traceparent", "").split("-")[2:3]
        await asyncio.sleep(0)
        message = {"role": "assistant", "content": prompt}
        return web.json_response(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
        )

    async def message(self, request: web.Request) -> web.Response:
        self.anthropic.append((request.match_info["attempt"], request.headers["Authorization"]))
        return web.json_response(
            {
                "id": "m",
                "type": "message",
                "role": "assistant",
                "model": "m",
                "content": [{"type": "text", "text": "hi"}],
                "stop_reason": "end_turn",
                "stop_sequence": None,
                "usage": {"input_tokens": 1, "output_tokens": 1},
            }
        )


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setenv("OPENAI_BASE_URL", "")  # what the tracer sets is undone after the test
    monkeypatch.setenv("OPENAI_API_KEY", "")
    server = Server()
    app = web.Application()
    app.add_routes([web.post("/rollout/{rollout}/attempt/{attempt}/v1/chat/completions", server.chat)])
    app.add_routes([web.post("/rollout/{rollout}/attempt/{attempt}/v1/messages", server.message)])
    app.add_routes([web.post("/base/rollout/{rollout}/attempt/{attempt}/v1/chat/completions", server.chat)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


def new_attempt(url: str) -> tuple[AttemptContext, list[Span]]:
    spans: list[Span] = []
    attempt_id = new_id()
    return AttemptContext(
        task(), attempt_id, spans.append, [].append, proxy_url=url, proxy_key=f"key-{attempt_id}"
    ), spans


def messages(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def test_fifty_attempts_share_one_client_and_each_call_and_span_has_its_own(server: Server) -> None:
    tracer = ProcessTracer("m:agent", [server.url])
    sync_client, async_client = openai.OpenAI(), openai.AsyncOpenAI()
    assert sync_client.api_key == PLACEHOLDER_KEY
    pool = ThreadPoolExecutor(8)
    pool.submit(int).result()

    def call(text: str) -> None:
        answer = sync_client.chat.completions.create(model="m", messages=messages(text))
        assert answer.choices[0].message.content == text
        ms.emit_reward(1.0, text)

    async def acall(text: str) -> None:
        answer = await async_client.chat.completions.create(model="m", messages=messages(text))
        assert answer.choices[0].message.content == text
        ms.emit_reward(1.0, text)

    async def one(attempt: AttemptContext) -> None:
        me = attempt.task.rollout_id
        with tracer.attempt(attempt):
            await asyncio.gather(acall(me), acall(me))
            await asyncio.to_thread(call, me)
            await asyncio.wrap_future(pool.submit(call, me))

    def one_sync(attempt: AttemptContext) -> None:
        me = attempt.task.rollout_id
        with tracer.attempt(attempt):
            call(me)
            thread = threading.Thread(target=call, args=(me,))
            thread.start()
            pool.submit(call, me).result()
            thread.join()
            call(me)

    made = [new_attempt(server.url) for _ in range(ATTEMPTS)]
    attempts = [attempt for attempt, _ in made]
    threads = [threading.Thread(target=one_sync, args=(a,)) for a in attempts[: ATTEMPTS // 2]]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(one(a) for a in attempts[ATTEMPTS // 2 :]))
    await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
    pool.shutdown()

    assert len(server.calls) == 4 * ATTEMPTS
    keys = {a.task.rollout_id: (a.attempt_id, f"Bearer {a.proxy_key}", a.proxy_key) for a in attempts}
    for rollout, attempt_id, bearer, api_key, prompt in server.calls:
        assert (rollout, (attempt_id, bearer, api_key)) == (prompt, keys[rollout])
    llm_spans: set[str] = set()
    for attempt, spans in made:
        me = attempt.task.rollout_id
        assert {s.rollout_id for s in spans} == {me}
        llm = [s for s in spans if s.kind == "llm"]
        assert len(llm) == 4
        for span in llm:
            asked = json.loads(span.attributes["gen_ai.input.messages"])
            assert asked[0]["parts"][0]["content"] == me
        assert [s.reward_name for s in spans if s.kind == "reward"] == [me] * 4
        assert len({s.trace_id for s in spans}) == 1
        llm_spans |= {s.span_id for s in llm}
    assert set(server.parents) == llm_spans  # the proxy can hang its span below the call's


async def test_outside_an_attempt_the_error_reaches_the_caller_as_it_is(server: Server) -> None:
    ProcessTracer("m:agent", [server.url])
    with pytest.raises(MillstreamError, match="only within a rollout"):
        await openai.AsyncOpenAI().chat.completions.create(model="m", messages=messages("x"))
    with pytest.raises(RuntimeError, match="only within a rollout"):
        await asyncio.to_thread(openai.OpenAI().chat.completions.create, model="m", messages=messages("x"))
    assert server.calls == []


@pytest.mark.parametrize("sends", [lambda c, r: c.send(r), lambda c, r: c.send(request=r)])
async def test_httpx_itself_is_bound_and_other_hosts_are_left_alone(
    server: Server, sends: Callable[[httpx.AsyncClient, httpx.Request], Any]
) -> None:
    tracer = ProcessTracer("m:agent", [server.url + "/base/"])
    attempt, _ = new_attempt(server.url + "/base/")
    async with httpx.AsyncClient() as client:
        with tracer.attempt(attempt):
            body = {"messages": messages("q")}
            request = client.build_request("POST", server.url + "/base/v1/chat/completions", json=body)
            assert (await sends(client, request)).status_code == 200
            assert (await sends(client, request)).status_code == 200  # the same request once more
    assert [c[0] for c in server.calls] == [attempt.task.rollout_id] * 2

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=f"{request.url} {request.headers.get('authorization')}")

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as elsewhere:
        assert (await elsewhere.get("http://example.com/v1/x")).text == "http://example.com/v1/x None"


async def test_a_client_made_in_an_attempt_belongs_to_it_in_whoevers_thread(server: Server) -> None:
    tracer = ProcessTracer("m:agent", [server.url])
    (first, _), (second, _) = new_attempt(server.url), new_attempt(server.url)
    with tracer.attempt(first):
        sync_client, async_client = ms.openai_client(max_retries=0), ms.async_openai_client(max_retries=0)

    def call() -> None:
        sync_client.chat.completions.create(model="m", messages=messages("x"))

    with tracer.attempt(second):  # the work of another
        await async_client.chat.completions.create(model="m", messages=messages("x"))
        await asyncio.to_thread(call)
        await ms.async_openai_client().chat.completions.create(model="m", messages=messages("y"))
    thread = threading.Thread(target=call)  # of no attempt
    thread.start()
    await asyncio.to_thread(thread.join)
    mine = (first.task.rollout_id, first.attempt_id, f"Bearer {first.proxy_key}")
    yours = (second.task.rollout_id, second.attempt_id, f"Bearer {second.proxy_key}")
    assert [call[:3] for call in server.calls] == [mine, mine, yours, mine]


async def test_anthropics_clients_are_bound_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    pytest.importorskip("anthropic")
    attempt, _ = new_attempt(server.url)
    with ProcessTracer("m:agent").attempt(attempt):
        sync_client, async_client = ms.anthropic_client(), ms.async_anthropic_client(max_retries=0)
    asked: Any = {"model": "m", "max_tokens": 1, "messages": messages("x")}
    await async_client.messages.create(**asked)
    await asyncio.to_thread(sync_client.messages.create, **asked)
    assert server.anthropic == [(attempt.attempt_id, f"Bearer {attempt.proxy_key}")] * 2


def test_without_a_proxy_or_a_rollout_they_are_ordinary_clients() -> None:
    attempt, _ = new_attempt("")
    with ProcessTracer("m:agent").attempt(attempt):
        client = ms.openai_client(api_key="k", base_url="http://example.com/v1")
    assert (str(client.base_url), client.api_key) == ("http://example.com/v1/", "k")
    assert ms.anthropic_client(api_key="k").api_key == "k"


@pytest.mark.parametrize("url", ["localhost:8400", "ftp://h", "http://"])
def test_a_proxy_url_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="proxy_url"):
        bind_clients(url)
