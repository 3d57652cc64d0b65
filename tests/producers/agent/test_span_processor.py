"""What agents and instrumentation do within an attempt, as the records that come of it."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from factories import task
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider

import millstream as ms
from millstream.producers.agent import emit, process_tracer
from millstream.producers.agent.attempt import AttemptContext, current_attempt
from millstream.producers.agent.process_tracer import ProcessTracer, adopt_global_provider
from millstream.schemas.errors import ConfigError, MillstreamError
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


def test_a_disabled_sdk_is_an_error_not_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with pytest.raises(ConfigError, match="OTEL_SDK_DISABLED"):
        ProcessTracer("a")
