"""Instrumentation that is missing or broken costs its spans and a warning that says what to install."""

import logging

import pytest
from opentelemetry.sdk.trace import TracerProvider

from millstream.producers import instrumentation

openai = pytest.importorskip("openai")
genai = pytest.importorskip("opentelemetry.instrumentation.genai.openai")
PACKAGE = "pip install opentelemetry-instrumentation-genai-openai==1.3b0"


def test_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(instrumentation, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        instrumentation._instrument_openai(TracerProvider(), openai)
    assert PACKAGE in caplog.text


def test_broken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def instrument(self: object, **options: object) -> None:
        raise AttributeError("Completions has no create")

    monkeypatch.setattr(genai.OpenAIInstrumentor, "instrument", instrument)
    with caplog.at_level(logging.WARNING):
        instrumentation._instrument_openai(TracerProvider(), openai)
    assert "AttributeError: Completions has no create" in caplog.text
    assert PACKAGE in caplog.text
