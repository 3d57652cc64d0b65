"""What is traced is chosen by name and said in the log; what is missing or broken costs its spans and a warning."""

import logging
from importlib import metadata
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from millstream.producers.agent import instrumentation
from millstream.producers.agent.instrumentation import FRAMEWORKS, chosen, report
from millstream.schemas.errors import ConfigError

openai = pytest.importorskip("openai")
genai = pytest.importorskip("opentelemetry.instrumentation.genai.openai")
PACKAGE = "pip install opentelemetry-instrumentation-genai-openai==1.3b0"


def test_chosen() -> None:
    assert chosen(None) == tuple(FRAMEWORKS)
    assert chosen("openai, langchain") == ("openai", "langchain")
    assert chosen("none") == ()
    for names in ("openai,haystack", "none,openai", ""):
        with pytest.raises(ConfigError, match="known are openai, anthropic, langchain, openai-agents, autogen, crewai"):
            chosen(names)


def test_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(instrumentation.metadata, "version", version)
    with caplog.at_level(logging.INFO):
        report(["openai"])
        instrumentation.instrument(TracerProvider(), ["openai"])
    assert "instruments on import: nothing" in caplog.text
    assert f"openai is installed, but its calls can't be traced: {PACKAGE}" in caplog.text


def test_not_installed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is only worth a word if somebody asked for it by name."""
    monkeypatch.setattr(instrumentation, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        report(["openai"])
    assert caplog.messages == ["instruments on import: nothing"]


def test_broken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def instrument(self: object, **options: Any) -> None:
        raise AttributeError("Completions has no create")

    monkeypatch.setattr(genai.OpenAIInstrumentor, "instrument", instrument)
    with caplog.at_level(logging.WARNING):
        instrumentation._instrument(TracerProvider(), FRAMEWORKS["openai"], openai)
    assert "the calls of openai can't be traced (AttributeError: Completions has no create)" in caplog.text
    assert PACKAGE in caplog.text
