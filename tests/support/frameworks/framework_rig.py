"""Runs an example agent in a runner, with the real proxy and a model server, and shows what was recorded."""

import asyncio
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model_server
from runner_rig import Ended, running, settings_for_tests

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span

ROOT = Path(__file__).parents[3]
ANYWHERE = "http://127.0.0.1:0"


@dataclass
class Trace:
    """One attempt's spans, as a tree."""

    ended: Ended

    @property
    def status(self) -> str:
        return self.ended.last.status

    @property
    def spans(self) -> Sequence[Span]:
        return self.ended.spans

    @property
    def root(self) -> Span:
        (root,) = [span for span in self.spans if not span.parent_id]
        return root

    def of(self, kind: str, source: str = semconv.SOURCE_AGENT) -> list[Span]:
        """By time of start; without the root."""
        found = [s for s in self.spans if s.kind == kind and s.source == source and s.parent_id]
        return sorted(found, key=lambda span: span.start)

    def above(self, span: Span) -> list[Span]:
        """The span's parent, its parent, and so on up to the root."""
        by_id = {s.span_id: s for s in self.spans}
        found = []
        while span.parent_id:
            span = by_id[span.parent_id]
            found.append(span)
        return found

    def names_above(self, span: Span) -> list[str]:
        return [s.name for s in self.above(span)]

    def tree(self) -> str:
        """For people."""
        lines = []
        for span in sorted(self.spans, key=lambda s: s.start):
            above = [s for s in self.spans if s.span_id == span.parent_id]
            depth = len(self.above(span)) if above or not span.parent_id else -1
            lines.append(f"{'  ' * depth}{span.name} [{span.kind} {span.source} {span.status} {span.scope_name}]")
        return "\n".join(lines)


def run(
    agent: str, tasks: Sequence[Any], *, proxy: bool = True, env: Mapping[str, str] | None = None, **options: Any
) -> list[Trace]:
    """The agent (of ``examples/frameworks/``, unless it is module:attribute) on each task, all at once, in one agent
    process with ``env``. With a proxy every call has to go through it; without one the SDKs speak to the model server
    itself."""
    path = agent if ":" in agent else f"examples.frameworks.{agent}:agent"
    return asyncio.run(_run(path, tasks, proxy, env or {}, options))


async def _run(
    agent: str, tasks: Sequence[Any], proxy: bool, env: Mapping[str, str], options: dict[str, Any]
) -> list[Trace]:
    settings = settings_for_tests(proxy_secret="secret" * 6, timeout_s=60)
    log = MemoryLog(settings.topics)
    async with serve(model_server.app(), ANYWHERE) as model_url:
        variables = dict(env)
        if not proxy:
            variables |= {"OPENAI_BASE_URL": model_url + "/v1", "OPENAI_API_KEY": "k"}
            variables |= {"ANTHROPIC_BASE_URL": model_url, "ANTHROPIC_API_KEY": "k"}
        front = Proxy(log, settings.model_copy(update={"model_url": model_url}))
        async with serve(front.app, ANYWHERE) as proxy_url:
            settings = settings.model_copy(update={"proxy_url": proxy_url if proxy else ""})
            with _environment(variables):
                async with running(
                    agent, ROOT, log=log, settings=settings, concurrency=64, env=list(variables), **options
                ) as rig:
                    await rig.publish(tasks)
                    ended = await rig.ends(len(tasks))
    return [Trace(ended[json.dumps(task)]) for task in tasks]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def assert_tree(trace: Trace) -> None:
    """One trace, in which every span hangs on the root, of one rollout and attempt."""
    root = trace.root
    assert root.name.startswith("invoke_agent ")
    assert {span.trace_id for span in trace.spans} == {root.trace_id}
    for span in trace.spans:
        if span is not root:
            assert trace.above(span)[-1] is root, trace.tree()
    counts = trace.ended.last.span_counts
    for source in counts:
        assert counts[source] == sum(span.source == source for span in trace.spans)


def assert_call(span: Span, city: str, *, model: str = "gpt-4o-mini") -> None:
    """All that there is to know of a model call that was answered."""
    attributes = span.attributes
    assert (span.kind, span.status, span.end > span.start) == (semconv.LLM, "Unset", True)
    assert attributes[semconv.OPERATION] == "chat"
    assert attributes[semconv.REQUEST_MODEL] == model
    assert attributes[semconv.RESPONSE_MODEL] == f"{model}-served"
    assert re.fullmatch(r"(chatcmpl|resp|msg)[-_]\d+", attributes[semconv.RESPONSE_ID])
    assert len(json.loads(attributes[semconv.FINISH_REASONS])) == 1
    assert (attributes[semconv.INPUT_TOKENS], attributes[semconv.OUTPUT_TOKENS]) == ("11", "3")
    assert f"weather in {city}" in json.dumps(json.loads(attributes[semconv.INPUT_MESSAGES]))
    (answer,) = json.loads(attributes[semconv.OUTPUT_MESSAGES])
    assert answer["role"] == "assistant"


def assert_asked_for_tool(span: Span, city: str) -> None:
    """A call in which the model was offered the tool and asked for it."""
    assert "weather" in [tool["name"] for tool in json.loads(span.attributes[semconv.TOOL_DEFINITIONS])]
    (answer,) = json.loads(span.attributes[semconv.OUTPUT_MESSAGES])
    (part,) = [part for part in answer["parts"] if part["type"] == "tool_call"]
    assert (part["name"], part["arguments"]) == ("weather", {"city": city})


def assert_told(span: Span, result: str) -> None:
    """A call whose prompt holds the tool's result."""
    parts = [part for message in json.loads(span.attributes[semconv.INPUT_MESSAGES]) for part in message["parts"]]
    assert result in [part["response"] for part in parts if part["type"] == "tool_call_response"]


def assert_tool(span: Span, city: str) -> None:
    attributes = span.attributes
    assert (span.kind, span.status, span.end > span.start) == (semconv.TOOL, "Unset", True)
    assert attributes[semconv.TOOL_NAME] == "weather"
    assert json.loads(attributes[semconv.TOOL_ARGUMENTS]) == {"city": city}
    assert attributes[semconv.TOOL_RESULT] == f"21 degrees in {city}"


def assert_tool_failed(span: Span) -> None:
    attributes = span.attributes
    assert (attributes[semconv.TOOL_NAME], span.status) == ("weather", "Error")
    assert "there is no Atlantis" in span.status_message


def assert_call_failed(span: Span) -> None:
    assert span.status == "Error"
    assert "there is no Nowhere" in span.status_message
    assert span.attributes[semconv.ERROR_TYPE]


def assert_proxied(trace: Trace) -> None:
    """Each call of the SDK went through the proxy once, whose span with token ids lies below it."""
    calls, proxied = trace.of(semconv.LLM), trace.of(semconv.LLM, semconv.SOURCE_PROXY)
    assert len(calls) == len(proxied) > 0
    below = {span.parent_id: span for span in proxied}
    for call in calls:
        span = below[call.span_id]
        assert span.attributes[semconv.RESPONSE_ID] == call.attributes[semconv.RESPONSE_ID]
        assert (span.model_version, len(span.response_token_ids or b"")) == ("run.0.1", 12)
