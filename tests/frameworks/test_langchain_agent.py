"""LangChain: an agent with a tool, asynchronous."""

import pytest
from agent_cases import AgentCases, Traces

from millstream.schemas.spans import semconv


@pytest.mark.feature("async")
class TestLangChain(AgentCases):
    agent = "langchain_agent"

    @pytest.mark.feature("structure")
    def test_structure(self, traces: Traces) -> None:
        trace = traces["Paris"]
        (agent,) = trace.of(semconv.AGENT)
        assert (agent.attributes[semconv.AGENT_NAME], agent.parent_id) == ("forecaster", trace.root.span_id)
        for span in trace.of(semconv.LLM) + trace.of(semconv.TOOL):
            assert span.parent_id == agent.span_id
