"""Fifty attempts of all frameworks at once in one process: each span has its own rollout, attempt and parent."""

import json
from itertools import cycle, islice

import pytest
from framework_rig import Trace, assert_tree, run

from millstream.schemas.spans import semconv

# How many calls of the agent's and of the proxy's, how many tool calls.
CALLS = {
    "autogen": (3, 3, 1),
    "langchain": (2, 2, 1),
    "openai-agents": (3, 3, 1),
    "anthropic": (1, 1, 0),
    "async generator": (2, 2, 0),
    "tasks": (3, 3, 0),
    "langgraph": (2, 2, 1),
    "plain http": (0, 2, 0),
    "anthropic tools": (2, 2, 0),
    "thread": (2, 2, 0),
    "timer": (1, 1, 0),
    "generator": (2, 2, 0),
    "nested loop": (2, 2, 0),
}
SYNC = ("langgraph", "plain http", "anthropic tools", "thread", "timer", "generator", "nested loop")


def assert_apart(tasks: list[dict[str, str]], traces: list[Trace]) -> None:
    cities = {task["city"] for task in tasks}
    for task, trace in zip(tasks, traces, strict=True):
        assert trace.status == "succeeded", trace.ended.last.error
        assert_tree(trace)
        proxied = trace.of(semconv.LLM, semconv.SOURCE_PROXY)
        found = len(trace.of(semconv.LLM)), len(proxied), len(trace.of(semconv.TOOL))
        assert found == CALLS[task["way"]], f"{task}\n{trace.tree()}"
        text = json.dumps([dict(span.attributes) for span in trace.spans])
        assert {city for city in cities if f"{city}." in text or f"{city}?" in text} == {task["city"]}
        by_id = {span.span_id: span for span in trace.spans}
        for span in proxied:
            above = by_id[span.parent_id]
            assert above is trace.root or above.attributes[semconv.RESPONSE_ID] == span.attributes[semconv.RESPONSE_ID]


@pytest.mark.feature(
    "50 at once",
    "openai_sdk",
    "anthropic_sdk",
    "langchain_agent",
    "langgraph_agent",
    "openai_agents",
    "autogen_team",
    "plain_http",
)
def test_async_agents_on_one_loop() -> None:
    tasks = [{"way": way, "city": f"city-{n:0{3 + n % 2}}"} for n, way in enumerate(islice(cycle(CALLS), 50))]
    traces = run("tests.support.frameworks.mixed_agent:agent", tasks)
    assert_apart(tasks, traces)


@pytest.mark.feature("50 at once", "openai_sdk", "anthropic_sdk", "langgraph_agent", "plain_http")
def test_sync_agents_in_threads() -> None:
    tasks = [{"way": way, "city": f"city-{n:03}"} for n, way in enumerate(islice(cycle(SYNC), 50))]
    traces = run("tests.support.frameworks.mixed_agent:sync_agent", tasks)
    assert_apart(tasks, traces)


def test_a_worker_thread_that_two_rollouts_share_fails_the_one_it_counts_for() -> None:
    """Both calls are recorded for the rollout that started the worker; neither is trained on."""
    tasks = [{"city": "Paris"}, {"city": "London"}]
    traces = run("tests.support.frameworks.worker_agent:agent", tasks)
    failed, succeeded = sorted(traces, key=lambda trace: trace.status)
    assert (failed.status, succeeded.status) == ("failed", "succeeded")
    assert len(failed.of(semconv.LLM, semconv.SOURCE_PROXY)) == 2
    error = failed.ended.last.error
    assert error is not None
    assert error.type == "SharedWorker"
    assert "thread 'shared-worker', which this rollout started" in error.message
    assert "ThreadPoolExecutor" in error.message
