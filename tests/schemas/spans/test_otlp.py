"""OTLP and records, against what OpenTelemetry's own SDK and exporter make of a span."""

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from factories import span, task
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode

from examples.sink.otlp import to_otlp
from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.span_processor import to_record
from millstream.schemas.spans import otlp, semconv
from millstream.schemas.spans.otlp import Malformed, from_otlp, parse_json, parse_protobuf
from millstream.schemas.spans.text import texts

IDS = {semconv.ROLLOUT_ID: "r", semconv.ATTEMPT_ID: "a"}


def made_by_the_sdk() -> list[ReadableSpan]:
    kept = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "s", "n": 1, **IDS}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer("scope", "1.2")
    other = SpanContext(7, 8, is_remote=True)
    values: dict[str, Any] = {
        "i": 1,
        "f": 0.5,
        "b": True,
        "l": ["a", "ü"],
        "s": "text",
        "gen_ai.operation.name": "chat",
    }
    with tracer.start_as_current_span("chat", kind=SpanKind.CLIENT, attributes=values, links=[Link(other, {"k": 2})]):
        reward = {"gen_ai.operation.name": "evaluation", "gen_ai.evaluation.name": "right"}
        with tracer.start_as_current_span("reward", attributes=reward | {"gen_ai.evaluation.score.value": 0.25}):
            trace.get_current_span().add_event("seen", {"n": 3})
        trace.get_current_span().set_status(StatusCode.ERROR, "no")
    return list(kept.get_finished_spans())


def test_a_span_by_otlp_is_the_record_that_our_own_processor_makes() -> None:
    spans = made_by_the_sdk()
    records, refused = from_otlp(*parse_protobuf(encode_spans(spans).SerializeToString()))
    attempt = AttemptContext(task(rollout_id="r"), "a", [].append, [].append)
    expected = [to_record(s, attempt, texts(s.resource.attributes)) for s in spans]
    assert records == [replace(e, source="otlp", sequence=e.start) for e in expected]
    assert [(r.kind, r.reward, r.reward_name) for r in records] == [("reward", 0.25, "right"), ("llm", None, None)]
    assert refused == []


def test_what_goes_out_comes_in_again() -> None:
    records, _ = from_otlp(encode_spans(made_by_the_sdk()))
    again, refused = from_otlp(*parse_protobuf(to_otlp(records).SerializeToString()))
    assert again == [replace(r, attributes={**r.attributes, **IDS}) for r in records]
    assert refused == []


def in_json(**fields: Any) -> bytes:
    """The specification's example, with unknown fields added."""
    one = {
        "traceId": "5B8EFFF798038103D269B633813FC60C",
        "spanId": "EEE19B7EC3C1B174",
        "parentSpanId": "EEE19B7EC3C1B173",
        "name": "I'm a server span",
        "startTimeUnixNano": "1544712660000000000",
        "endTimeUnixNano": 1544712661000000000,
        "kind": 2,
        "attributes": [
            {"key": "millstream.rollout_id", "value": {"stringValue": "r"}},
            {"key": "n", "value": {"intValue": "7"}},
            {"key": "l", "value": {"arrayValue": {"values": [{"doubleValue": 0.5}, {"boolValue": False}]}}},
        ],
        "status": {"code": 2},
        "inventedLater": 1,
    }
    resource = {"attributes": [{"key": "millstream.attempt_id", "value": {"stringValue": "a"}}]}
    spans = [{"resource": resource, "scopeSpans": [{"scope": {"name": "my.library"}, "spans": [one | fields]}]}]
    return json.dumps({"resourceSpans": spans}).encode()


def test_json_has_ids_in_hex_and_the_attempt_may_be_named_in_the_span_or_its_resource() -> None:
    ((record,), refused) = from_otlp(*parse_json(in_json()))
    assert (record.trace_id, record.parent_id) == ("5b8efff798038103d269b633813fc60c", "eee19b7ec3c1b173")
    assert (record.rollout_id, record.attempt_id, record.span_kind, record.status) == ("r", "a", "Server", "Error")
    assert (record.attributes["n"], record.attributes["l"], record.scope_name) == ("7", "[0.5, false]", "my.library")
    assert (record.end - record.start, refused) == (1_000_000_000, [])


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"resourceSpans": 5}', b'{"resourceSpans": [{"scopeSpans": [{"spans": 5}]}]}']
)
def test_what_is_no_request_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        parse_json(body)
    with pytest.raises(Malformed):
        parse_protobuf(b"\xff" + body)


def test_a_span_without_attempt_or_ids_is_refused_with_the_reason() -> None:
    for body, why in [(in_json(attributes=[]), "has millstream.rollout_id and"), (in_json(spanId="00"), "8")]:
        records, (reason,) = from_otlp(*parse_json(body))
        assert records == []
        assert "I'm a server span" in reason
        assert why in reason


BAD_JSON: list[dict[str, Any]] = [
    {"traceId": "xyz"},
    {"links": [1]},
    {"links": 5},
    {"kind": []},
    {"name": "half \ud83d"},
    {"startTimeUnixNano": "soon"},
    {"startTimeUnixNano": str(1 << 64)},
    {"attributes": [{"key": "k", "value": {"intValue": str(1 << 63)}}]},
    {"attributes": 5},
]


@pytest.mark.parametrize("bad", BAD_JSON, ids=str)
def test_a_span_in_json_that_cannot_be_read_costs_itself_only(bad: dict[str, Any]) -> None:
    """Section F3: one bad span costs itself, not its batch."""
    document = json.loads(in_json())
    spans = document["resourceSpans"][0]["scopeSpans"][0]["spans"]
    spans[:] = [spans[0], spans[0] | bad, dict(spans[0])]
    records, (reason,) = from_otlp(*parse_json(json.dumps(document).encode()))
    assert [record.name for record in records] == ["I'm a server span"] * 2
    assert reason


def three(name: bytes) -> bytes:
    """An encoded request of three spans; ``name``: 6 bytes, of the second one."""
    spans = [span(task(), "a", name=each) for each in ("first", "MARKER", "last")]
    encoded: bytes = to_otlp(spans).SerializeToString()
    return encoded.replace(b"MARKER", name)


@pytest.mark.parametrize("cut", [b"MARK\xf0\x9f", b"\xff\xfe\xfd\xfc\xfb\xfa", b"\xed\xa0\xbdabc"])
def test_a_span_with_a_text_that_is_not_utf8_costs_itself_only(cut: bytes) -> None:
    """Section F3, in protobuf: exporters cut texts within a character."""
    records, (reason,) = from_otlp(*parse_protobuf(three(cut)))
    assert [record.name for record in records] == ["first", "last"]
    assert "can't be read" in reason


def test_a_span_that_breaks_its_reader_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind_of(attributes: Any) -> str:
        raise OverflowError("too much")

    monkeypatch.setattr(otlp, "kind_of", kind_of)
    assert from_otlp(*parse_json(in_json())) == ([], ['span "I\'m a server span": too much'])


@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_body_raises_anything_but_malformed(noise: bytes, at: int) -> None:
    whole = three(b"MARKER")
    for body in (noise, whole[:at], whole[:at] + noise + whole[at:]):
        with suppress(Malformed):
            from_otlp(*parse_protobuf(body))
