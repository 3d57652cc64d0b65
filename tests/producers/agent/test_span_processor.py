"""What agents and instrumentation do within an attempt, as the records that come of it."""

import asyncio
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web
from factories import task
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from runner_rig import running, write_agent

import millstream as ms
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.producers.agent import emit, process_tracer
from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.producers.agent.process_tracer import ProcessTracer, adopt_global_provider
from millstream.schemas.errors import MillstreamError
from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import Span

AGENT = ProcessTracer("demo:agent")


def new_attempt() -> tuple[AttemptContext, list[Span]]:
    spans: list[Span] = []
    return AttemptContext(task(), new_id(), spans.append, [].append), spans


@contextmanager
def an_attempt() -> Iterator[list[Span]]:
    attempt, spans = new_attempt()
    with AGENT.attempt(attempt):
        yield spans


def test_an_attempt_has_one_root_and_everything_hangs_below_it() -> None:
    with an_attempt() as spans:
        ms.emit_span("look up", {"gen_ai.operation.name": "execute_tool"})
        ms.emit_reward(0.5)
    tool, reward, root = spans
    assert [s.kind for s in spans] == ["tool", "reward", "agent"]
    assert (root.name, root.parent_id) == ("invoke_agent demo:agent", "")
    assert tool.parent_id == reward.parent_id == root.span_id
    assert len({s.trace_id for s in spans}) == 1
    assert [s.sequence for s in spans] == [1, 2, 3]
    assert {s.source for s in spans} == {"agent"}
    assert codec.decode(codec.encode(tool)) == tool


def test_two_attempts_are_two_traces() -> None:
    with an_attempt() as first:
        pass
    with an_attempt() as second:
        pass
    assert first[0].trace_id != second[0].trace_id
    assert first[0].rollout_id != second[0].rollout_id


def test_a_reward_is_typed_and_carries_both_conventions() -> None:
    with an_attempt() as spans:
        ms.emit_reward(1, "correct")
    reward = spans[0]
    assert (reward.reward, reward.reward_name) == (1.0, "correct")
    assert reward.attributes == {
        "gen_ai.operation.name": "evaluation",
        "gen_ai.evaluation.name": "correct",
        "gen_ai.evaluation.score.value": "1.0",
        "agentlightning.reward.0.name": "correct",
        "agentlightning.reward.0.value": "1.0",
    }


def test_a_reward_names_the_call_that_it_is_for() -> None:
    with an_attempt() as spans:
        ms.emit_reward(0.5, for_call="chatcmpl-7")
    assert spans[0].attributes["millstream.reward.for_call"] == "chatcmpl-7"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", None, 1j, 10**400])
def test_a_reward_that_is_no_finite_number_is_refused_where_it_is_made(value: object) -> None:
    with an_attempt() as spans, pytest.raises(MillstreamError, match="finite number"):
        ms.emit_reward(value, "r")  # type: ignore[arg-type]
    assert [s.kind for s in spans] == ["agent"]


def test_any_json_is_an_attribute() -> None:
    with an_attempt() as spans:
        ms.emit_span("s", {"text": "é", "n": 3, "f": 0.5, "yes": True, "none": None, "deep": {"a": [1, {"b": "ü"}]}})
    assert spans[0].attributes == {
        "text": "é",
        "n": "3",
        "f": "0.5",
        "yes": "true",
        "none": "null",
        "deep": '{"a": [1, {"b": "ü"}]}',
    }
    assert spans[0].start == spans[0].end


def test_error_type_makes_a_failure() -> None:
    with an_attempt() as spans:
        ms.emit_span("tool", {"gen_ai.operation.name": "execute_tool", "error.type": "KeyError"})
    assert (spans[0].status, spans[0].status_message) == ("Error", "KeyError")


def test_an_agents_exception_is_on_the_root_span() -> None:
    attempt, spans = new_attempt()
    with pytest.raises(ValueError, match="no such"), AGENT.attempt(attempt):
        raise ValueError("no such city")
    root = spans[0]
    assert (root.status, root.events[0].name) == ("Error", "exception")
    assert root.events[0].attributes["exception.message"] == "no such city"


def test_plain_opentelemetry_spans_come_whole() -> None:
    attempt, spans = new_attempt()
    with AGENT.attempt(attempt):
        other = attempt.tracer.start_span("other", context=Context())  # a new trace, outside of the attempt's context
        other.end()
        with attempt.tracer.start_as_current_span(
            "http", kind=trace.SpanKind.CLIENT, links=[trace.Link(other.get_span_context(), {"why": 1})]
        ) as span:
            span.set_attribute("sizes", [1, 2])
            span.add_event("retry", {"n": 2})
    http = next(s for s in spans if s.name == "http")
    assert (http.span_kind, http.kind, http.attributes) == ("Client", "span", {"sizes": "[1, 2]"})
    assert [(e.name, e.attributes) for e in http.events] == [("retry", {"n": "2"})]
    assert http.links[0].span_id == f"{other.get_span_context().span_id:016x}"
    assert http.links[0].attributes == {"why": "1"}
    assert http.scope_name == "millstream"
    assert http.resource == {"service.name": "millstream-agent"}
    assert http.end >= http.start > 1_700_000_000_000_000_000


def test_a_span_belongs_where_it_began_wherever_it_ends() -> None:
    attempt, spans = new_attempt()
    with AGENT.attempt(attempt):
        streamed = attempt.tracer.start_span("stream")
    with an_attempt() as others:
        streamed.end()
    assert [s.name for s in spans] == ["invoke_agent demo:agent", "stream"]
    assert [s.name for s in others] == ["invoke_agent demo:agent"]


async def test_the_attempt_follows_tasks_threads_and_executors() -> None:
    pool = ThreadPoolExecutor(2)
    pool.submit(int).result()  # a thread that is older than any attempt

    async def rollout() -> tuple[str, list[Span]]:
        attempt, spans = new_attempt()
        with AGENT.attempt(attempt):
            ms.emit_span("loop")
            await asyncio.create_task(asyncio.sleep(0, ms.emit_span("task")))
            await asyncio.to_thread(ms.emit_span, "to_thread")
            await asyncio.wrap_future(pool.submit(ms.emit_span, "executor"))
            thread = threading.Thread(target=ms.emit_span, args=("thread",))
            thread.start()
            await asyncio.to_thread(thread.join)
        return attempt.attempt_id, spans

    for attempt_id, spans in await asyncio.gather(*(rollout() for _ in range(20))):
        assert sorted(s.name for s in spans) == sorted(
            ["loop", "task", "to_thread", "executor", "thread", "invoke_agent demo:agent"]
        )
        assert {s.attempt_id for s in spans} == {attempt_id}
        assert sorted(s.sequence for s in spans) == [1, 2, 3, 4, 5, 6]
    pool.shutdown()


def test_outside_a_rollout_it_warns_once_and_does_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emit, "_warned", threading.Event())
    assert current_attempt() is None
    with caplog.at_level(logging.WARNING):
        ms.emit_reward(1.0)
        ms.emit_span("x")
    assert [r.message for r in caplog.records] == [
        "span 'reward' is not recorded: this code does not run within a rollout"
    ]


def test_a_provider_of_the_agents_own_is_tapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: own)
    adopt_global_provider()
    adopt_global_provider()
    with an_attempt() as spans:
        own.get_tracer("agent").start_span("mine").end()
    assert [s.name for s in spans] == ["mine", "invoke_agent demo:agent"]
    assert own in process_tracer._tapped


def test_a_provider_that_an_agent_creates_within_its_attempt_is_recorded_and_may_be_shut_down() -> None:
    with an_attempt() as spans:
        own = TracerProvider(shutdown_on_exit=False)
        with own.get_tracer("agent").start_as_current_span("mine"):
            ms.emit_span("below")
        open_span = AGENT._tracer.start_span("open")
        own.shutdown()
        open_span.end()
    below, mine, last, _ = spans
    assert (below.name, mine.name, last.name) == ("below", "mine", "open")
    assert below.parent_id == mine.span_id


@pytest.mark.parametrize("nested", [1, 2])
def test_spans_below_one_that_is_not_sampled_hang_below_the_root(nested: int) -> None:
    unsampled = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False).get_tracer("agent")
    with an_attempt() as spans, ExitStack() as stack:
        for _ in range(nested):
            stack.enter_context(unsampled.start_as_current_span("unseen"))
        with AGENT._tracer.start_as_current_span("outer"):
            ms.emit_span("inner")
    inner, outer, root = spans
    assert (inner.parent_id, outer.parent_id) == (outer.span_id, root.span_id)
    assert len({span.trace_id for span in spans}) == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("true", "SPAN_ONLY"),
        ("True", "SPAN_ONLY"),
        ("1", "SPAN_ONLY"),
        ("SPAN_AND_EVENT", "SPAN_AND_EVENT"),
        ("NO_CONTENT", "NO_CONTENT"),
        ("false", "false"),
    ],
)
def test_a_value_that_means_the_opposite_to_the_instrumentations_is_corrected(
    given: str, kept: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
    monkeypatch.setenv(name, given)
    ProcessTracer("a")
    assert os.environ[name] == kept
    assert ("it is set to SPAN_ONLY" in caplog.text) == (given != kept)


LIMITED = """
    import os
    import millstream as ms
    from opentelemetry import trace

    def agent(input):
        with trace.get_tracer("mine").start_as_current_span("work") as span:
            for n in range(200):
                span.set_attribute(f"a{n}", "x" * 500)
                span.add_event(f"e{n}", {f"b{k}": "y" * 500 for k in range(3)})
        return {name: os.environ.get(name) for name in ("OTEL_SDK_DISABLED", "OTEL_TRACES_SAMPLER")}
"""


async def test_limits_and_samplers_of_the_environment_do_not_cut_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold for the agent's own telemetry, and stay as they are."""
    environment = {
        "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "100",
        "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT": "100",
        "OTEL_ATTRIBUTE_COUNT_LIMIT": "2",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "2",
        "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT": "2",
        "OTEL_SPAN_EVENT_COUNT_LIMIT": "2",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_SDK_DISABLED": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = write_agent(tmp_path, LIMITED, "limited.py")
    async with running("limited:agent", folder, processes=1, env=list(environment)) as rig:
        await rig.publish([1])
        (one,) = (await rig.ends(1)).values()
    (work,) = [span for span in one.spans if span.name == "work"]
    assert len(work.attributes) == len(work.events) == 200
    assert {len(text) for text in work.attributes.values()} == {500}
    assert {len(event.attributes) for event in work.events} == {3}
    assert one.last.output == '{"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_SAMPLER": "always_off"}'


@pytest.mark.parametrize("index", [None, "x"])
async def test_a_fault_of_an_instrumentation_costs_its_span_and_never_the_agents_stream(
    index: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A streamed tool call without an index: a TypeError within OpenAI's instrumentation."""
    function = {"name": "add", "arguments": "{}"}
    call = {"id": "c1", "type": "function", "function": function, "index": index}
    piece = {
        "id": "1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}],
    }

    async def stream(_: web.Request) -> web.Response:
        body = f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n"
        return web.Response(text=body, content_type="text/event-stream")

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", stream)])
    async with serve(app, "http://127.0.0.1:0") as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k")
        with an_attempt() as spans:
            answer = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "?"}], stream=True
            )
            names = [call.function.name async for piece in answer for call in piece.choices[0].delta.tool_calls]
    assert names == ["add"]
    assert "its instrumentation failed: TypeError" in caplog.text
    assert spans[-1].status != "Error"


COMPLETION: dict[str, Any] = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}


@pytest.fixture
async def served() -> AsyncIterator[Callable[[dict[str, Any], int], str]]:
    """Answers with the body and status that it is called with, which gives the base URL."""
    now: list[tuple[dict[str, Any], int]] = []

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(now[-1][0], status=now[-1][1])

    app = web.Application()
    app.add_routes([web.post("/v1/{rest:.*}", answer)])
    async with serve(app, "http://127.0.0.1:0") as url:

        def answering(body: dict[str, Any], status: int = 200) -> str:
            now.append((body, status))
            return f"{url}/v1"

        yield answering


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [5]},
        {"role": "assistant", "content": None, "tool_calls": {"id": "c1"}},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": {"name": {}, "arguments": []}}]},
        "hello",
        ["hello"],
    ],
)
@pytest.mark.parametrize("concurrent", [False, True])
async def test_a_fault_of_an_instrumentation_costs_the_agent_no_answer(
    served: Callable[..., str], message: object, concurrent: bool
) -> None:
    """Entry D6, in whole answers: the agent gets what it gets without instrumentation."""
    url = served(COMPLETION | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
    with an_attempt():
        if concurrent:
            async with openai.AsyncOpenAI(base_url=url, api_key="k") as client:
                answer = await client.chat.completions.create(**asked)
        else:
            with openai.OpenAI(base_url=url, api_key="k") as one:
                answer = await asyncio.to_thread(one.chat.completions.create, **asked)
    assert answer.model_dump(warnings=False)["choices"][0]["message"] is not None
    assert answer.id == "c"


@pytest.mark.parametrize(
    "content",
    [5, "hello", [5], ["hello"], [{"type": "tool_use", "id": 5, "name": {}, "input": "x"}], [{"type": "text"}]],
)
@pytest.mark.parametrize("concurrent", [False, True])
async def test_a_fault_of_anthropics_instrumentation_costs_the_agent_no_answer(
    served: Callable[..., str], content: object, concurrent: bool
) -> None:
    """Entry D6, of another client."""
    message = {"id": "c", "type": "message", "role": "assistant", "model": "m", "content": content, "usage": None}
    url = served(message, 200).removesuffix("/v1")
    asked: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "?"}]}
    with an_attempt():
        if concurrent:
            async with anthropic.AsyncAnthropic(base_url=url, api_key="k") as client:
                answer = await client.messages.create(**asked)
        else:
            with anthropic.Anthropic(base_url=url, api_key="k") as one:
                answer = await asyncio.to_thread(one.messages.create, **asked)
    assert answer.id == "c"
    assert answer.content is not None


@pytest.mark.parametrize("fault", ["before the call", "after it", "of an error"])
@pytest.mark.parametrize("concurrent", [False, True])
async def test_an_instrumentation_that_fails_changes_neither_answer_nor_error(
    served: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    concurrent: bool,
) -> None:
    """Entry D6: wherever in the call it fails. The call is made once."""
    from opentelemetry.instrumentation.genai.openai import patch
    from opentelemetry.util.genai.invocation import InferenceInvocation

    def broken(*_: object, **__: object) -> None:
        raise TypeError("a beta release")

    if fault == "before the call":
        monkeypatch.setattr(patch, "create_chat_invocation", broken)
    elif fault == "after it":
        monkeypatch.setattr(patch, "_set_response_properties", broken)
    else:
        monkeypatch.setattr(InferenceInvocation, "fail", broken)
    choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
    body, status = COMPLETION | {"choices": [choice]}, 400 if fault == "of an error" else 200
    url = served(body, status)
    asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}]}

    async def ask() -> Any:
        if concurrent:
            async with openai.AsyncOpenAI(base_url=url, api_key="k") as client:
                return await client.chat.completions.create(**asked)
        with openai.OpenAI(base_url=url, api_key="k") as one:
            return await asyncio.to_thread(one.chat.completions.create, **asked)

    with an_attempt():
        if status == 400:
            with pytest.raises(openai.BadRequestError):
                await ask()
        else:
            assert (await ask()).choices[0].message.content == "yes"
    assert "a call is not fully traced, its instrumentation failed: TypeError: a beta release" in caplog.text
