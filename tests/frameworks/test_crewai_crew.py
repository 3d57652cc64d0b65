"""CrewAI: a crew of two agents, each with a task. Its instrumentation is OpenInference's, with names of its own."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agent_cases import AgentCases, Traces
from framework_rig import run

from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span


@pytest.mark.feature("async")
class TestCrewAI(AgentCases):
    agent = "crewai_crew"
    calls = 3
    last_says = "You asked about Paris"
    survives_its_tool = True

    def assert_tool(self, tool: Span) -> None:
        assert tool.attributes["tool.name"] == "weather"
        assert json.loads(tool.attributes["input.value"]) == {"city": "Paris"}
        assert (tool.attributes["output.value"], tool.status) == ("21 degrees in Paris", "Ok")

    def assert_tool_failed(self, tool: Span) -> None:
        assert (tool.attributes["tool.name"], tool.status) == ("weather", "Error")
        assert "there is no Atlantis" in tool.status_message

    @pytest.mark.feature("structure")
    def test_structure(self, traces: Traces) -> None:
        trace = traces["Paris"]
        (crew,) = trace.of(semconv.CHAIN)
        assert (crew.name, crew.parent_id) == ("weather desk.kickoff", trace.root.span_id)
        forecaster, editor = trace.of(semconv.AGENT)
        assert [a.attributes["graph.node.id"] for a in (forecaster, editor)] == ["forecaster", "editor"]
        assert forecaster.parent_id == editor.parent_id == crew.span_id
        first, second, third = trace.of(semconv.LLM)
        (tool,) = trace.of(semconv.TOOL)
        assert first.parent_id == tool.parent_id == second.parent_id == forecaster.span_id
        assert third.parent_id == editor.span_id
        assert json.loads(editor.attributes["input.value"])["context"] == "Tool: 21 degrees in Paris"
        failed = traces["Nowhere"].of(semconv.CHAIN) + traces["Nowhere"].of(semconv.AGENT)
        assert {span.status for span in failed} == {"Error"}


@contextmanager
def way_out() -> Iterator[tuple[dict[str, str], list[bytes]]]:
    """An HTTP proxy that refuses everything: variables that lead there, and what was asked of it."""
    asked: list[bytes] = []

    def refuse() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(1 << 16).split(b"\r\n")[0])

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=refuse, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        yield {"HTTPS_PROXY": address, "HTTP_PROXY": address, "NO_PROXY": "127.0.0.1"}, asked
        server.shutdown(socket.SHUT_RDWR)


def test_crewai_sends_no_telemetry(tmp_path: Path) -> None:
    """Unless it is switched on."""
    for switch, sends in (({}, False), ({"CREWAI_DISABLE_TELEMETRY": "false"}, True)):
        with way_out() as (variables, asked):
            run("crewai_crew", [{"city": "Paris"}], env={"XDG_DATA_HOME": str(tmp_path), **variables, **switch})
        assert any(b"crewai" in line for line in asked) == sends
        assert sends or not asked
