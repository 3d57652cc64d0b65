"""LangGraph: a graph of three nodes, synchronous, whose nodes run in an executor."""

import pytest
from framework_rig import (
    Trace,
    assert_asked_for_tool,
    assert_call,
    assert_call_failed,
    assert_proxied,
    assert_told,
    assert_tool,
    assert_tool_failed,
    assert_tree,
    run,
)

from millstream.schemas import semconv


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    tasks = [{"city": city} for city in ("Paris", "Atlantis", "Nowhere")]
    return {task["city"]: trace for task, trace in zip(tasks, run("langgraph_agent", tasks), strict=True)}


@pytest.mark.feature("call")
def test_calls(traces: dict[str, Trace]) -> None:
    trace = traces["Paris"]
    assert trace.status == "succeeded"
    assert_tree(trace)
    for call in trace.of(semconv.LLM):
        assert_call(call, "Paris")


@pytest.mark.feature("tools")
def test_tools(traces: dict[str, Trace]) -> None:
    trace = traces["Paris"]
    first, second = trace.of(semconv.LLM)
    (tool,) = trace.of(semconv.TOOL)
    assert_asked_for_tool(first, "Paris")
    assert_tool(tool, "Paris")
    assert_told(second, "21 degrees in Paris")
    assert first.end <= tool.start < tool.end <= second.start


@pytest.mark.feature("structure")
def test_structure(traces: dict[str, Trace]) -> None:
    trace = traces["Paris"]
    (graph,) = trace.of(semconv.CHAIN)
    assert (graph.name, graph.parent_id) == ("invoke_workflow forecast", trace.root.span_id)
    for span in trace.of(semconv.LLM) + trace.of(semconv.TOOL):
        assert span.parent_id == graph.span_id


@pytest.mark.feature("stream")
def test_stream() -> None:
    (trace,) = run("langgraph_agent", [{"city": "Paris", "stream": True}])
    assert trace.status == "succeeded", trace.ended.last.error
    assert_tree(trace)
    assert_proxied(trace)
    calls = trace.of(semconv.LLM)
    assert len(calls) == 2
    for call in calls:
        assert_call(call, "Paris")
    assert_asked_for_tool(calls[-2], "Paris")
    assert "Tool: 21 degrees in Paris" in calls[-1].attributes[semconv.OUTPUT_MESSAGES]
    (tool,) = trace.of(semconv.TOOL)
    assert_tool(tool, "Paris")


@pytest.mark.feature("error")
def test_errors(traces: dict[str, Trace]) -> None:
    for city in ("Atlantis", "Nowhere"):
        assert traces[city].status == "failed"
        assert_tree(traces[city])
    (tool,) = traces["Atlantis"].of(semconv.TOOL)
    assert_tool_failed(tool)
    (call,) = traces["Nowhere"].of(semconv.LLM)
    assert_call_failed(call)


@pytest.mark.feature("proxy")
def test_proxy(traces: dict[str, Trace]) -> None:
    assert_proxied(traces["Paris"])
