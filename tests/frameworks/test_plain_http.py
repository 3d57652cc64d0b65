"""No SDK: the proxy alone records the calls."""

import json

import pytest
from framework_rig import Trace, assert_tree, run

from millstream.schemas.spans import semconv


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    tasks = [{"city": city} for city in ("Paris", "Nowhere")]
    return {task["city"]: trace for task, trace in zip(tasks, run("plain_http", tasks), strict=True)}


@pytest.mark.feature("proxy")
def test_proxy(traces: dict[str, Trace]) -> None:
    trace = traces["Paris"]
    assert trace.status == "succeeded"
    assert_tree(trace)
    assert trace.of(semconv.LLM) == []
    first, second = trace.of(semconv.LLM, semconv.SOURCE_PROXY)
    assert first.parent_id == second.parent_id == trace.root.span_id
    asked = json.loads(first.attributes[semconv.RESPONSE_MESSAGE])["tool_calls"][0]["function"]
    assert asked == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert json.loads(second.attributes[semconv.REQUEST_MESSAGES])[-1]["content"] == "21 degrees in Paris"
    assert len(second.response_token_ids or b"") == 12


@pytest.mark.feature("error")
def test_error(traces: dict[str, Trace]) -> None:
    assert traces["Nowhere"].status == "failed"
    (call,) = traces["Nowhere"].of(semconv.LLM, semconv.SOURCE_PROXY)
    assert (call.status, call.status_message) == ("Error", "there is no Nowhere")
