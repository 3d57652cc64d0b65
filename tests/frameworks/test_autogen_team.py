"""AutoGen: a team of two agents that take turns."""

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
    return {task["city"]: trace for task, trace in zip(tasks, run("autogen_team", tasks), strict=True)}


@pytest.mark.feature("async")
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
    first, second, _ = trace.of(semconv.LLM)
    (tool,) = trace.of(semconv.TOOL)
    assert_asked_for_tool(first, "Paris")
    assert_tool(tool, "Paris")
    assert_told(second, "21 degrees in Paris")
    assert first.end <= tool.start < tool.end <= second.start


@pytest.mark.feature("structure")
def test_structure(traces: dict[str, Trace]) -> None:
    trace = traces["Paris"]
    (team,) = trace.of(semconv.CHAIN)
    assert (team.name, team.parent_id) == ("invoke_workflow RoundRobinGroupChat", trace.root.span_id)
    assert "Maximum number of messages" in team.attributes["autogen.stop_reason"]
    at_work = [a for a in trace.of(semconv.AGENT) if a.attributes[semconv.OPERATION] == "invoke_agent"]
    assert [a.attributes[semconv.AGENT_NAME] for a in at_work] == ["forecaster", "critic"]
    assert {a.parent_id for a in at_work} == {team.span_id}
    first, second, third = trace.of(semconv.LLM)
    (tool,) = trace.of(semconv.TOOL)
    assert first.parent_id == tool.parent_id == second.parent_id == at_work[0].span_id
    assert third.parent_id == at_work[1].span_id


@pytest.mark.feature("stream")
def test_stream() -> None:
    (trace,) = run("autogen_team", [{"city": "Paris", "stream": True}])
    assert trace.status == "succeeded", trace.ended.last.error
    assert_tree(trace)
    assert_proxied(trace)
    calls = trace.of(semconv.LLM)
    assert len(calls) == 3
    for call in calls:
        assert_call(call, "Paris")
    assert_asked_for_tool(calls[-3], "Paris")
    assert "You asked about Paris" in calls[-1].attributes[semconv.OUTPUT_MESSAGES]
    (tool,) = trace.of(semconv.TOOL)
    assert_tool(tool, "Paris")


@pytest.mark.feature("error")
def test_errors(traces: dict[str, Trace]) -> None:
    """AutoGen tells the model of a tool that fails; the attempt goes on."""
    assert [traces[city].status for city in ("Atlantis", "Nowhere")] == ["succeeded", "failed"]
    (tool,) = traces["Atlantis"].of(semconv.TOOL)
    assert_tool_failed(tool)
    assert tool.attributes[semconv.ERROR_TYPE] == "ValueError"
    (call,) = traces["Nowhere"].of(semconv.LLM)
    assert_call_failed(call)
    (team,) = traces["Nowhere"].of(semconv.CHAIN)
    assert team.status == "Error"


@pytest.mark.feature("proxy")
def test_proxy(traces: dict[str, Trace]) -> None:
    assert_proxied(traces["Paris"])
