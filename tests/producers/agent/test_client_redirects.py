"""Clients that were created for the public API before the run: within an attempt, their model calls go to the proxy.

One real server plays the proxy, another the public API, which must see nothing.
"""

import asyncio
import http.client
import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import httpx
import pytest
import urllib3
from aiohttp import web
from factories import task

from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.client_binding import OutsideProxy, OutsideRollout
from millstream.producers.agent.process_tracer import ProcessTracer
from millstream.schemas.ids import new_id

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
langchain_openai = pytest.importorskip("langchain_openai")
requests = pytest.importorskip("requests")

REAL_KEY = "sk-real"
ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CHAT = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
}
MESSAGE = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
RESPONSE = {"id": "r", "object": "response", "created_at": 1, "model": "m", "output": [], "status": "completed"}
EMBEDDING = {"object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}]}
ANSWERS = {"messages": MESSAGE, "responses": RESPONSE, "embeddings": EMBEDDING}


class Recording:
    """Answers any model API, and keeps each request: method, path with query, and headers as text."""

    def __init__(self) -> None:
        self.url = ""
        self.seen: list[tuple[str, str, str]] = []

    async def answer(self, request: web.Request) -> web.Response:
        headers = "\n".join(f"{name.lower()}: {value}" for name, value in request.headers.items())
        self.seen.append((request.method, request.path_qs, headers))
        return web.json_response(ANSWERS.get(request.path.rpartition("/")[2], CHAT))


async def _served() -> AsyncIterator[Recording]:
    server = Recording()
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


@pytest.fixture
async def public() -> AsyncIterator[Recording]:
    async for server in _served():
        yield server


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Recording]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "")  # what the tracer sets is undone after the test
    async for server in _served():
        yield server


def new_attempt(proxy_url: str) -> AttemptContext:
    attempt_id = new_id()
    return AttemptContext(task(), attempt_id, [].append, [].append, proxy_url=proxy_url, proxy_key=f"key-{attempt_id}")


def openai_chat(url: str) -> Callable[[], Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=REAL_KEY, organization="org", max_retries=0)
    return lambda: client.chat.completions.create(**ASKED)


def openai_completions(url: str) -> Callable[[], Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=REAL_KEY, max_retries=0)
    return lambda: client.completions.create(model="m", prompt="hi")


def openai_responses(url: str) -> Callable[[], Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=REAL_KEY, max_retries=0)
    return lambda: client.responses.create(model="m", input="hi")


def openai_embeddings(url: str) -> Callable[[], Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=REAL_KEY, max_retries=0)
    return lambda: client.embeddings.create(model="m", input="hi", encoding_format="float")


def openai_other_prefix(url: str) -> Callable[[], Any]:  # as Groq, DeepSeek or OpenRouter have one
    client = openai.OpenAI(base_url=f"{url}/api/openai", api_key=REAL_KEY, max_retries=0)
    return lambda: client.chat.completions.create(**ASKED)


def openai_async(url: str) -> Callable[[], Any]:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=REAL_KEY, max_retries=0)
    return lambda: client.chat.completions.create(**ASKED)


def azure(url: str) -> Callable[[], Any]:
    client = openai.AzureOpenAI(azure_endpoint=url, api_key=REAL_KEY, api_version="2024-10-21", max_retries=0)
    return lambda: client.chat.completions.create(**ASKED)


def anthropic_messages(url: str) -> Callable[[], Any]:
    client = anthropic.Anthropic(base_url=url, api_key=REAL_KEY, max_retries=0)
    return lambda: client.messages.create(max_tokens=1, **ASKED)


def anthropic_async(url: str) -> Callable[[], Any]:
    client = anthropic.AsyncAnthropic(base_url=url, api_key=REAL_KEY, max_retries=0)
    return lambda: client.messages.create(max_tokens=1, **ASKED)


def langchain(url: str) -> Callable[[], Any]:
    model = langchain_openai.ChatOpenAI(model="m", base_url=f"{url}/v1", api_key=REAL_KEY, max_retries=0)
    return lambda: model.invoke("hi")


def langchain_async(url: str) -> Callable[[], Any]:
    model = langchain_openai.ChatOpenAI(model="m", base_url=f"{url}/v1", api_key=REAL_KEY, max_retries=0)
    return lambda: model.ainvoke("hi")


HEADERS = {"Authorization": f"Bearer {REAL_KEY}", "api-key": REAL_KEY}


def plain_httpx(url: str) -> Callable[[], Any]:
    client = httpx.Client(headers=HEADERS, cookies={"session": REAL_KEY})
    return lambda: client.post(f"{url}/v1/chat/completions", json=ASKED).raise_for_status()


def plain_requests(url: str) -> Callable[[], Any]:
    session = requests.Session()
    session.headers.update(HEADERS)
    return lambda: session.post(f"{url}/v1/messages", json=ASKED).raise_for_status()


def plain_aiohttp(url: str) -> Callable[[], Any]:
    asked = {"model": "m", "input": "hi"}

    async def call() -> None:
        async with (
            aiohttp.ClientSession(headers=HEADERS, cookies={"session": REAL_KEY}) as session,
            session.post(f"{url}/v1/responses", json=asked) as answer,
        ):
            answer.raise_for_status()

    return call


def plain_urllib(url: str) -> Callable[[], Any]:
    def call() -> None:
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(ASKED).encode(), HEADERS)
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200

    return call


REDIRECTED = [
    openai_chat,
    openai_completions,
    openai_responses,
    openai_embeddings,
    openai_other_prefix,
    openai_async,
    azure,
    anthropic_messages,
    anthropic_async,
    langchain,
    langchain_async,
    plain_httpx,
    plain_requests,
    plain_aiohttp,
    plain_urllib,
]


async def called(call: Callable[[], Any]) -> Any:
    """Runs a sync call in a thread: the servers need this loop."""
    answer = await asyncio.to_thread(call)
    return await answer if asyncio.iscoroutine(answer) else answer


@pytest.mark.parametrize("made", REDIRECTED)
async def test_a_client_made_before_the_run_calls_the_proxy_and_not_the_public_api(
    public: Recording, proxy: Recording, made: Callable[[str], Callable[[], Any]]
) -> None:
    """Entry A2: the client is made before the run sets OPENAI_BASE_URL, with a real key."""
    call = made(public.url)
    tracer = ProcessTracer("m:agent", [proxy.url])
    for attempt in (new_attempt(proxy.url), new_attempt(proxy.url)):
        with tracer.attempt(attempt):
            await called(call)
        method, path, headers = proxy.seen.pop()
        assert (method, path.startswith(f"{attempt.path}/v1/")) == ("POST", True)
        assert f"authorization: Bearer {attempt.proxy_key}" in headers
        assert f"x-api-key: {attempt.proxy_key}" in headers
        assert f"host: {proxy.url.removeprefix('http://')}" in headers
        assert REAL_KEY not in headers
    assert (public.seen, proxy.seen) == ([], [])


@pytest.mark.parametrize("made", REDIRECTED)
async def test_without_a_proxy_an_attempt_calls_what_its_client_names(
    public: Recording, proxy: Recording, made: Callable[[str], Callable[[], Any]]
) -> None:
    ProcessTracer("m:agent", [proxy.url])  # of another run in this process
    with ProcessTracer("m:agent").attempt(new_attempt("")):
        await called(made(public.url))
    ((_, _, headers),) = public.seen
    assert REAL_KEY in headers
    assert proxy.seen == []


async def test_a_call_of_an_ended_attempt_is_refused_and_reaches_no_server(public: Recording, proxy: Recording) -> None:
    call = openai_chat(public.url)
    attempt = new_attempt(proxy.url)
    with ProcessTracer("m:agent", [proxy.url]).attempt(attempt):
        context = attempt.context
    with pytest.raises(OutsideRollout, match="has ended"):
        await asyncio.to_thread(_in_context, context, call)
    assert (public.seen, proxy.seen) == ([], [])


def _in_context(context: Any, call: Callable[[], Any]) -> Any:
    from opentelemetry import context as otel

    token = otel.attach(context)
    try:
        return call()
    finally:
        otel.detach(token)


def gemini(url: str) -> Callable[[], Any]:
    return lambda: httpx.post(f"{url}/v1beta/models/gemini:generateContent?key={REAL_KEY}", json={"contents": []})


def vertex_stream(url: str) -> Callable[[], Any]:
    return lambda: requests.post(f"{url}/v1/projects/p/models/claude:streamRawPredict", json={"messages": []})


def bedrock(url: str) -> Callable[[], Any]:
    return lambda: urllib3.PoolManager().request("POST", f"{url}/model/us.claude/converse-stream", body=b"{}")


def ollama(url: str) -> Callable[[], Any]:
    return lambda: httpx.post(f"{url}/api/chat", json=ASKED)


def urllib3_chat(url: str) -> Callable[[], Any]:
    return lambda: urllib3.PoolManager().request("POST", f"{url}/v1/chat/completions", json=ASKED, headers=HEADERS)


def http_client_chat(url: str) -> Callable[[], Any]:
    def call() -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("POST", "/v1/messages", json.dumps(ASKED), HEADERS)

    return call


@pytest.mark.parametrize("made", [gemini, vertex_stream, bedrock, ollama, urllib3_chat, http_client_chat])
async def test_a_model_call_that_cannot_be_redirected_is_refused(
    public: Recording, proxy: Recording, made: Callable[[str], Callable[[], Any]]
) -> None:
    tracer = ProcessTracer("m:agent", [proxy.url])
    with tracer.attempt(new_attempt(proxy.url)), pytest.raises(OutsideProxy, match="through the proxy") as raised:
        await asyncio.to_thread(made(public.url))
    assert REAL_KEY not in str(raised.value)
    assert (public.seen, proxy.seen) == ([], [])


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/v10/channels/7/messages", {"content": "hi"}),  # a chat service
        ("POST", "/api/v1/messages", {"to": "me"}),
        ("POST", "/forms/7/responses", {"answers": []}),
        ("POST", "/api/chat", {"text": "hi"}),
        ("GET", "/v1/messages", None),
        ("POST", "/v1/search", {"model": "car"}),
    ],
)
async def test_what_is_not_a_model_call_is_left_alone(
    public: Recording, proxy: Recording, method: str, path: str, body: Any
) -> None:
    with ProcessTracer("m:agent", [proxy.url]).attempt(new_attempt(proxy.url)):
        await asyncio.to_thread(httpx.request, method, public.url + path, json=body, headers=HEADERS)
        await asyncio.to_thread(requests.request, method, public.url + path, json=body, headers=HEADERS)
        async with (
            aiohttp.ClientSession(headers=HEADERS) as session,
            session.request(method, public.url + path, json=body),
        ):
            pass
    assert [(seen[0], seen[1], REAL_KEY in seen[2]) for seen in public.seen] == [(method, path, True)] * 3
    assert proxy.seen == []


@pytest.mark.parametrize("made", [plain_requests, plain_aiohttp, plain_urllib])
async def test_every_client_that_calls_the_proxy_is_bound_to_its_attempt(
    proxy: Recording, made: Callable[[str], Callable[[], Any]]
) -> None:
    attempt = new_attempt(proxy.url)
    with ProcessTracer("m:agent", [proxy.url]).attempt(attempt):
        await called(made(proxy.url))
    ((_, path, headers),) = proxy.seen
    assert path.startswith(f"{attempt.path}/v1/")
    assert f"authorization: Bearer {attempt.proxy_key}" in headers


async def test_the_first_redirected_call_to_a_host_is_logged(
    public: Recording, proxy: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    call = openai_chat(public.url)
    with ProcessTracer("m:agent", [proxy.url]).attempt(new_attempt(proxy.url)):
        await asyncio.to_thread(call)
        await asyncio.to_thread(call)
    (record,) = [r for r in caplog.records if "go to the proxy" in r.getMessage()]
    assert public.url in record.getMessage()


def test_the_run_replaces_the_keys_and_addresses_of_both_sdks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI", "ANTHROPIC"):
        monkeypatch.setenv(f"{name}_BASE_URL", "https://api.example.com")
        monkeypatch.setenv(f"{name}_API_KEY", REAL_KEY)
    ProcessTracer("m:agent", ["http://127.0.0.1:9"])
    assert str(openai.OpenAI().base_url) == "http://127.0.0.1:9/v1/"
    assert str(anthropic.Anthropic().base_url).rstrip("/") == "http://127.0.0.1:9"
    assert REAL_KEY not in (openai.OpenAI().api_key, anthropic.Anthropic().api_key)
