"""What agents say for themselves, as the records that come of it."""

import json
from dataclasses import dataclass
from datetime import date
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import millstream as ms
from millstream.producers.agent import emit
from millstream.producers.agent.emit import EmitError, RewardError
from millstream.schemas.wire import codec
from tests.producers.agent.test_span_processor import an_attempt


def test_a_dict_is_several_rewards_in_its_order() -> None:
    with an_attempt() as spans:
        ms.emit_reward({"correct": 1, "short": 0.25}, for_call="chatcmpl-7")
    correct, short, _ = spans
    assert [(s.name, s.kind, s.reward_name, s.reward) for s in (correct, short)] == [
        ("correct", "reward", "correct", 1.0),
        ("short", "reward", "short", 0.25),
    ]
    assert short.attributes == {
        "gen_ai.operation.name": "evaluation",
        "gen_ai.evaluation.name": "short",
        "gen_ai.evaluation.score.value": "0.25",
        "agentlightning.reward.0.name": "short",
        "agentlightning.reward.0.value": "0.25",
        "millstream.reward.for_call": "chatcmpl-7",
    }


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        ({"good": 1.0, "bad": float("nan")}, None, "reward 'bad' is nan"),
        ({"good": 1.0}, "both", "without a name"),
        ({}, None, "at least one"),
    ],
)
def test_of_rewards_that_can_not_be_none_is_recorded(value: Any, name: str | None, message: str) -> None:
    with an_attempt() as spans, pytest.raises(RewardError, match=message):
        ms.emit_reward(value, name)
    assert [s.kind for s in spans] == ["agent"]


def test_a_message_an_object_an_annotation() -> None:
    @dataclass
    class Found:
        city: str
        when: date

    with an_attempt() as spans:
        ms.emit_message("Größe", {"level": 2})
        ms.emit_object({"a": [1, None, "é"], "raw": b"\x00\xff"})
        ms.emit_object(Found("Paris", date(2026, 1, 2)), {"why": "test"})
        ms.emit_annotation({"tags": ["slow"], "nested": {"deep": {"er": True}}})
    message, plain, found, note, root = spans
    assert {s.parent_id for s in spans[:-1]} == {root.span_id}
    assert (message.name, message.attributes) == (
        "agentlightning.message",
        {"agentlightning.message.body": "Größe", "level": "2"},
    )
    assert plain.attributes["agentlightning.object.type"] == "dict"
    assert json.loads(plain.attributes["agentlightning.object.json"]) == {"a": [1, None, "é"], "raw": "AP8="}
    assert found.attributes["agentlightning.object.type"].endswith("Found")
    assert json.loads(found.attributes["agentlightning.object.json"]) == {"city": "Paris", "when": "2026-01-02"}
    assert found.attributes["why"] == "test"
    assert (note.name, note.attributes) == (
        "agentlightning.annotation",
        {"tags": '["slow"]', "nested": '{"deep": {"er": true}}'},
    )
    assert [codec.decode(codec.encode(s)) for s in spans] == spans


def test_an_exception_is_a_failed_span_with_its_stack() -> None:
    with an_attempt() as spans:
        try:
            raise KeyError("Atlantis")
        except KeyError as error:
            ms.emit_exception(error, {"tool": "map"})
    span = spans[0]
    assert (span.name, span.status, span.status_message) == (
        "agentlightning.exception",
        "Error",
        "KeyError: 'Atlantis'",
    )
    assert (span.attributes["exception.type"], span.attributes["exception.message"]) == ("KeyError", "'Atlantis'")
    assert "test_an_exception_is_a_failed_span" in span.attributes["exception.stacktrace"]
    assert (span.attributes["error.type"], span.attributes["tool"]) == ("KeyError", "map")


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("emitted", "message"),
    [
        (lambda: ms.emit_span("s", {"a": CIRCLE}), "span 's': attribute 'a' is not JSON"),
        (lambda: ms.emit_span("s", {3: 1}), "span 's': attribute name 3 is not a string"),  # type: ignore[dict-item]
        (lambda: ms.emit_message(3), "a message must be a string, not int"),  # type: ignore[arg-type]
        (lambda: ms.emit_object(object()), "an object of type object is not JSON"),
    ],
)
def test_what_is_no_json_is_refused_by_name(emitted: Any, message: str) -> None:
    with an_attempt() as spans, pytest.raises(EmitError, match=message):
        emitted()
    assert [s.kind for s in spans] == ["agent"]


def test_what_is_too_large_is_refused_by_name_and_limit() -> None:
    limit = emit.MAX_ATTRIBUTE_BYTES
    with an_attempt() as spans:
        ms.emit_span("fits", {"a": "x" * limit})
        with pytest.raises(EmitError, match=r"span 's': attribute 'b': 67,108,866 bytes, of at most 67,108,864"):
            ms.emit_span("s", {"a": 1, "b": "é" * (limit // 2 + 1)})
        with pytest.raises(EmitError, match=r"span 's': its attributes: .* of at most 134,217,728"):
            ms.emit_span("s", {"a": "x" * limit, "b": "x" * limit})
        with pytest.raises(EmitError, match=r"attribute 'agentlightning\.object\.json'"):
            ms.emit_object(["x" * limit])
    assert [s.name for s in spans] == ["fits", "invoke_agent demo:agent"]


def spans_of_another_process() -> list[ReadableSpan]:
    """A tool call within a job, as an exporter sees them."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "tool-server"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("tools")
    with (
        tracer.start_as_current_span("job", kind=trace.SpanKind.SERVER),
        tracer.start_as_current_span("call", attributes={"gen_ai.operation.name": "execute_tool", "sizes": [1, 2]}),
    ):
        pass
    return list(exporter.get_finished_spans())


def test_a_span_made_elsewhere_comes_whole_and_hangs_below_the_current_one() -> None:
    call, job = spans_of_another_process()
    with an_attempt() as spans:
        ms.emit_otel_span("remote call", call)
        ms.emit_otel_span("remote job", job)
        ms.emit_otel_span("plain", {"n": 1})
    inner, outer, plain, root = spans
    assert (inner.name, inner.kind, inner.attributes["sizes"]) == ("remote call", "tool", "[1, 2]")
    assert (outer.span_kind, outer.resource) == ("Server", {"service.name": "tool-server"})
    assert (inner.start, inner.end) == (call.start_time, call.end_time)
    assert (inner.parent_id, outer.parent_id) == (outer.span_id, root.span_id)
    assert len({s.trace_id for s in spans}) == 1
    assert (plain.name, plain.attributes) == ("plain", {"n": "1"})
    assert sorted(s.sequence for s in spans) == [1, 2, 3, 4]


def test_a_span_that_has_not_ended_is_refused() -> None:
    span = TracerProvider(shutdown_on_exit=False).get_tracer("t").start_span("open")
    assert isinstance(span, ReadableSpan)
    with an_attempt(), pytest.raises(EmitError, match="span 'late': a span can be recorded only after it has ended"):
        ms.emit_otel_span("late", span)
