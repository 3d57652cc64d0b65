"""--instrument: what is not chosen leaves no spans, and the proxy records its calls all the same."""

import logging

import pytest
from framework_rig import assert_tree, run

from millstream.schemas.spans import semconv

TASK = {"city": "Paris"}


def test_narrow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "millstream"):
        (trace,) = run("langchain_agent", [TASK], instrument="openai")
    assert "instruments on import: openai" in caplog.messages
    assert_tree(trace)
    assert (trace.of(semconv.AGENT), trace.of(semconv.TOOL)) == ([], [])
    assert [call.scope_name for call in trace.of(semconv.LLM)] == ["opentelemetry.instrumentation.genai.openai"] * 2


def test_none() -> None:
    (trace,) = run("langchain_agent", [TASK], instrument="none")
    assert_tree(trace)
    assert {span.source for span in trace.spans if span is not trace.root} == {semconv.SOURCE_PROXY}
    assert len(trace.spans) == 3


def test_all(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "millstream"):
        run("plain_http", [TASK])
    assert "instruments on import: openai, anthropic, langchain, openai-agents, autogen" in caplog.messages
