"""CrewAI: a crew of two agents, each with a task. Its instrumentation is OpenInference's, with names of its own."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

from millstream.schemas import semconv


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    tasks = [{"city": city} for city in ("Paris", "Atlantis", "Nowhere")]
    ran = run("crewai_crew", tasks, env=at_home_in(tmp_path_factory.mktemp("home")))
    return {task["city"]: trace for task, trace in zip(tasks, ran, strict=True)}


def at_home_in(folder: Path) -> dict[str, str]:
    return {"XDG_DATA_HOME": str(folder)}  # CrewAI keeps each crew's last outputs there


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
    assert tool.attributes["tool.name"] == "weather"
    assert json.loads(tool.attributes["input.value"]) == {"city": "Paris"}
    assert (tool.attributes["output.value"], tool.status) == ("21 degrees in Paris", "Ok")
    assert_told(second, "21 degrees in Paris")
    assert first.end <= tool.start < tool.end <= second.start


@pytest.mark.feature("structure")
def test_structure(traces: dict[str, Trace]) -> None:
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


@pytest.mark.feature("stream")
def test_stream(tmp_path: Path) -> None:
    (trace,) = run("crewai_crew", [{"city": "Paris", "stream": True}], env=at_home_in(tmp_path))
    assert trace.status == "succeeded", trace.ended.last.error
    assert_tree(trace)
    assert_proxied(trace)
    calls = trace.of(semconv.LLM)
    assert len(calls) == 3
    for call in calls:
        assert_call(call, "Paris")
    assert_asked_for_tool(calls[0], "Paris")
    assert "You asked about Paris" in calls[-1].attributes[semconv.OUTPUT_MESSAGES]


@pytest.mark.feature("error")
def test_errors(traces: dict[str, Trace]) -> None:
    """CrewAI tells the model of a tool that fails; the attempt goes on."""
    assert [traces[city].status for city in ("Atlantis", "Nowhere")] == ["succeeded", "failed"]
    (tool,) = traces["Atlantis"].of(semconv.TOOL)
    assert (tool.attributes["tool.name"], tool.status) == ("weather", "Error")
    assert "there is no Atlantis" in tool.status_message
    (call,) = traces["Nowhere"].of(semconv.LLM)
    assert_call_failed(call)
    assert {span.status for span in traces["Nowhere"].of(semconv.CHAIN) + traces["Nowhere"].of(semconv.AGENT)} == {
        "Error"
    }


@pytest.mark.feature("proxy")
def test_proxy(traces: dict[str, Trace]) -> None:
    assert_proxied(traces["Paris"])


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


def test_nothing_is_told_to_its_makers(tmp_path: Path) -> None:
    """Unless somebody wants it."""
    for switch, told in (({}, False), ({"CREWAI_DISABLE_TELEMETRY": "false"}, True)):
        with way_out() as (variables, asked):
            run("crewai_crew", [{"city": "Paris"}], env={**at_home_in(tmp_path), **variables, **switch})
        assert any(b"crewai" in line for line in asked) == told
        assert told or not asked
