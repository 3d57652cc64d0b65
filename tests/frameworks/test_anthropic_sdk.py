"""The Anthropic SDK in all its ways; the proxy asks the policy for chat completions, so that no token ids are lost."""

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

MODEL = "claude-haiku-4-5"
WAYS = ("chat", "chat_async", "stream", "stream_async", "tools")


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    tasks = [{"way": way, "city": f"{way}-ville"} for way in WAYS] + [{"way": "chat", "city": "Nowhere"}]
    return {task["city"]: trace for task, trace in zip(tasks, run("anthropic_sdk", tasks), strict=True)}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("chat", marks=pytest.mark.feature("call")),
        pytest.param("chat_async", marks=pytest.mark.feature("async")),
        pytest.param("stream", marks=pytest.mark.feature("stream")),
        pytest.param("stream_async", marks=pytest.mark.feature("stream")),
    ],
)
def test_call(traces: dict[str, Trace], way: str) -> None:
    trace = traces[f"{way}-ville"]
    assert trace.status == "succeeded"
    assert_tree(trace)
    (call,) = trace.of(semconv.LLM)
    assert_call(call, f"{way}-ville", model=MODEL)
    assert call.parent_id == trace.root.span_id
    assert f"asked about {way}-ville" in call.attributes[semconv.OUTPUT_MESSAGES]


@pytest.mark.feature("tools")
def test_tools(traces: dict[str, Trace]) -> None:
    trace = traces["tools-ville"]
    assert_tree(trace)
    first, second = trace.of(semconv.LLM)
    assert_asked_for_tool(first, "tools-ville")
    assert_call(first, "tools-ville", model=MODEL)
    assert_call(second, "tools-ville", model=MODEL)
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
