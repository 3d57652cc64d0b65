"""What traces must show of an agent with a tool, in every framework."""

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
)

from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span

Traces = dict[str, Trace]  # "Paris", where all is well, also as a "stream"; "Atlantis", no tool; "Nowhere", no model


class AgentCases:
    """Its subclasses add how the spans of their framework hang together."""

    agent: str  # in examples/frameworks
    calls = 2
    asking = 0  # the call that asks for the tool; the next one gets its result
    last_says = "Tool: 21 degrees in Paris"
    survives_its_tool = False  # the model gets the error of a failed tool, and the attempt goes on

    def assert_tool(self, tool: Span) -> None:
        assert_tool(tool, "Paris")

    def assert_tool_failed(self, tool: Span) -> None:
        assert_tool_failed(tool)

    @pytest.mark.feature("call")
    def test_calls(self, traces: Traces) -> None:
        trace = traces["Paris"]
        assert trace.status == "succeeded"
        assert_tree(trace)
        calls = trace.of(semconv.LLM)
        assert len(calls) == self.calls
        for call in calls:
            assert_call(call, "Paris")

    @pytest.mark.feature("tools")
    def test_tools(self, traces: Traces) -> None:
        trace = traces["Paris"]
        calls = trace.of(semconv.LLM)
        assert len(calls) == self.calls
        first, second = calls[self.asking : self.asking + 2]
        (tool,) = trace.of(semconv.TOOL)
        assert_asked_for_tool(first, "Paris")
        self.assert_tool(tool)
        assert_told(second, "21 degrees in Paris")
        assert first.end <= tool.start < tool.end <= second.start

    @pytest.mark.feature("stream")
    def test_stream(self, traces: Traces) -> None:
        trace = traces["stream"]
        assert trace.status == "succeeded", trace.ended.last.error
        assert_tree(trace)
        assert_proxied(trace)
        calls = trace.of(semconv.LLM)
        assert len(calls) == self.calls
        for call in calls:
            assert_call(call, "Paris")
        assert_asked_for_tool(calls[self.asking], "Paris")
        assert self.last_says in calls[-1].attributes[semconv.OUTPUT_MESSAGES]
        (tool,) = trace.of(semconv.TOOL)
        self.assert_tool(tool)

    @pytest.mark.feature("error")
    def test_errors(self, traces: Traces) -> None:
        assert traces["Atlantis"].status == ("succeeded" if self.survives_its_tool else "failed")
        assert traces["Nowhere"].status == "failed"
        for city in ("Atlantis", "Nowhere"):
            assert_tree(traces[city])
        (tool,) = traces["Atlantis"].of(semconv.TOOL)
        self.assert_tool_failed(tool)
        (call,) = traces["Nowhere"].of(semconv.LLM)
        assert_call_failed(call)

    @pytest.mark.feature("proxy")
    def test_proxy(self, traces: Traces) -> None:
        assert_proxied(traces["Paris"])
