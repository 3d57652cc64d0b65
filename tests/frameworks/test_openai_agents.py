"""The OpenAI Agents SDK: one agent hands over to another."""

import pytest
from agent_cases import AgentCases, Traces

from millstream.schemas.spans import semconv


@pytest.mark.feature("async")
class TestOpenAIAgents(AgentCases):
    agent = "openai_agents"
    calls, asking = 3, 1

    @pytest.mark.feature("structure")
    def test_structure(self, traces: Traces) -> None:
        trace = traces["Paris"]
        (workflow,) = trace.of(semconv.CHAIN)
        triage, forecaster = trace.of(semconv.AGENT)
        assert workflow.parent_id == trace.root.span_id
        assert triage.parent_id == forecaster.parent_id == workflow.span_id
        assert [a.attributes[semconv.AGENT_NAME] for a in (triage, forecaster)] == ["triage", "forecaster"]
        handing_over, first, second = trace.of(semconv.LLM)
        (tool,) = trace.of(semconv.TOOL)
        assert handing_over.parent_id == triage.span_id
        assert "transfer_to_forecaster" in handing_over.attributes[semconv.OUTPUT_MESSAGES]
        assert first.parent_id == tool.parent_id == second.parent_id == forecaster.span_id
