"""AutoGen: a team of two agents that take turns."""

import pytest
from agent_cases import AgentCases, Traces
from framework_rig import assert_tool_failed

from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span


@pytest.mark.feature("async")
class TestAutoGen(AgentCases):
    agent = "autogen_team"
    calls = 3
    last_says = "You asked about Paris"
    survives_its_tool = True

    def assert_tool_failed(self, tool: Span) -> None:
        assert_tool_failed(tool)
        assert tool.attributes[semconv.ERROR_TYPE] == "ValueError"

    @pytest.mark.feature("structure")
    def test_structure(self, traces: Traces) -> None:
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
        (team,) = traces["Nowhere"].of(semconv.CHAIN)
        assert team.status == "Error"
