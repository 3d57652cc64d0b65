"""The OpenAI SDK in all its ways."""

import pytest
from framework_rig import (
    Trace,
    assert_asked_for_tool,
    assert_call,
    assert_call_failed,
    assert_proxied,
    assert_told,
    assert_tree,
    run,
)

from millstream.schemas.spans import semconv

WAYS = ("chat", "chat_async", "parse", "tools", "stream", "stream_async", "responses", "responses_async")


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    tasks = [{"way": way, "city": f"{way}-ville"} for way in WAYS] + [{"way": "chat", "city": "Nowhere"}]
    return {task["city"]: trace for task, trace in zip(tasks, run("openai_sdk", tasks), strict=True)}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("chat", marks=pytest.mark.feature("call")),
        pytest.param("chat_async", marks=pytest.mark.feature("async")),
        pytest.param("stream", marks=pytest.mark.feature("stream")),
        pytest.param("stream_async", marks=pytest.mark.feature("stream")),
        pytest.param("parse", marks=pytest.mark.feature("parse")),
        pytest.param("responses", marks=pytest.mark.feature("responses")),
        pytest.param("responses_async", marks=pytest.mark.feature("responses")),
    ],
)
def test_call(traces: dict[str, Trace], way: str) -> None:
    trace = traces[f"{way}-ville"]
    assert trace.status == "succeeded"
    assert_tree(trace)
    (call,) = trace.of(semconv.LLM)
    assert_call(call, f"{way}-ville")
    assert call.parent_id == trace.root.span_id
    assert (way == "parse") or f"asked about {way}-ville" in call.attributes[semconv.OUTPUT_MESSAGES]


@pytest.mark.feature("tools")
def test_tools(traces: dict[str, Trace]) -> None:
    trace = traces["tools-ville"]
    assert_tree(trace)
    first, second = trace.of(semconv.LLM)
    assert_asked_for_tool(first, "tools-ville")
    assert_call(first, "tools-ville")
    assert_call(second, "tools-ville")
    assert_told(second, "21 degrees in tools-ville")


@pytest.mark.feature("error")
def test_error(traces: dict[str, Trace]) -> None:
    trace = traces["Nowhere"]
    assert trace.status == "failed"
    assert_tree(trace)
    (call,) = trace.of(semconv.LLM)
    assert_call_failed(call)


@pytest.mark.feature("proxy")
def test_proxy(traces: dict[str, Trace]) -> None:
    for way in WAYS:
        assert_proxied(traces[f"{way}-ville"])
