"""LangGraph: a graph of three nodes, synchronous, whose nodes run in an executor."""

import pytest
from agent_cases import AgentCases, Traces

from millstream.schemas.spans import semconv


class TestLangGraph(AgentCases):
    agent = "langgraph_agent"

    @pytest.mark.feature("structure")
    def test_structure(self, traces: Traces) -> None:
        trace = traces["Paris"]
        (graph,) = trace.of(semconv.CHAIN)
        assert (graph.name, graph.parent_id) == ("invoke_workflow forecast", trace.root.span_id)
        for span in trace.of(semconv.LLM) + trace.of(semconv.TOOL):
            assert span.parent_id == graph.span_id
