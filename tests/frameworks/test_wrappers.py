"""Wrappers for LangChain's models and AutoGen's agents."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import model_server
import pytest
from runner_rig import settings_for_tests

import millstream as ms
from examples.frameworks.weather import MODEL, weather
from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.proxy import Proxy
from millstream.pipeline.services.serve_aiohttp import serve
from millstream.producers.agent.client_binding import OutsideRollout
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span

ANYWHERE = "http://127.0.0.1:0"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tracer sets is undone after the test."""
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "")


def agent(task: Any) -> None:
    """Its body is the test."""


@asynccontextmanager
async def traced() -> AsyncIterator[tuple[ms.Tracer, str]]:
    """A tracer, and the address of the proxy that its calls go through."""
    settings = settings_for_tests(proxy_secret="secret" * 6)
    log = MemoryLog(settings.topics)
    async with AsyncExitStack() as stack:
        model_url = await stack.enter_async_context(serve(model_server.app(), ANYWHERE))
        proxy = Proxy(log, settings.model_copy(update={"model_url": model_url}))
        url = await stack.enter_async_context(serve(proxy.app, ANYWHERE))
        yield ms.Tracer(agent, log=log, settings=settings, proxy_url=url), url


def of(spans: Any, kind: str, source: str) -> list[Span]:
    return [span for span in spans if (span.kind, span.source) == (kind, source)]


def cities(trace: ms.TracedRollout) -> list[str]:
    """That its calls were about, by the proxy."""
    calls = of(trace.spans, semconv.LLM, semconv.SOURCE_PROXY)
    return [json.loads(c.attributes[semconv.REQUEST_MESSAGES])[-1]["content"].split()[-1] for c in calls]


async def test_a_wrapped_model_stands_wherever_the_model_does() -> None:
    from langchain.agents import create_agent
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(model=MODEL, base_url="http://127.0.0.1:1/v1", api_key="k", max_retries=0, temperature=1.0)  # type: ignore[arg-type]
    async with traced() as (tracer, url):
        wrapped = ms.integrations.langchain.LLMWrapper(llm, proxy_endpoint=url)
        assert isinstance(wrapped, ChatOpenAI)
        assert (wrapped.model_name, wrapped.temperature, wrapped.max_retries) == (MODEL, 1.0, 0)
        async with tracer.trace() as trace:
            said = await asyncio.to_thread(wrapped.invoke, "the weather in Lima")
            assert said.content == "You asked about Lima"
            said = await asyncio.to_thread(wrapped, "the weather in Oslo")  # type: ignore[operator]
            assert said.content == "You asked about Oslo"
            chain = ChatPromptTemplate.from_template("the weather in {city}") | wrapped | StrOutputParser()
            assert await chain.ainvoke({"city": "Rome"}) == "You asked about Rome"
            asked = await wrapped.bind_tools([weather]).ainvoke("the weather in Cork")
            assert asked.tool_calls[0]["args"] == {"city": "Cork"}
            forecaster = create_agent(wrapped, [weather], name="forecaster")
            answer = await forecaster.ainvoke({"messages": [{"role": "user", "content": "the weather in Bari"}]})
            assert answer["messages"][-1].content == "Tool: 21 degrees in Bari"
    assert cities(trace) == ["Lima", "Oslo", "Rome", "Cork", "Bari", "Bari"]
    assert [t.reason for t in trace.triplets] == [None] * 6
    assert trace.triplets[-1].agent_name == "forecaster"
    own = {span.span_id for span in of(trace.spans, semconv.LLM, semconv.SOURCE_AGENT)}
    assert {span.parent_id for span in of(trace.spans, semconv.LLM, semconv.SOURCE_PROXY)} == own
    assert llm.openai_api_base == "http://127.0.0.1:1/v1", "the model itself stays as it was"


async def test_one_wrapped_model_serves_many_rollouts_at_once() -> None:
    from langchain_openai import ChatOpenAI

    async with traced() as (tracer, url):
        wrapped = ms.integrations.langchain.LLMWrapper(
            ChatOpenAI(model=MODEL, api_key="k"), proxy_endpoint=url + "/v1/"
        )  # type: ignore[arg-type]

        async def one(n: int) -> list[str]:
            async with tracer.trace() as trace:
                await wrapped.ainvoke(f"the weather in City-{n}")
                await wrapped.ainvoke(f"the weather in City-{n}")
            return cities(trace)

        assert await asyncio.gather(*(one(n) for n in range(20))) == [[f"City-{n}"] * 2 for n in range(20)]
        with pytest.raises(OutsideRollout, match="only within a rollout"):
            await wrapped.ainvoke("Hello")


def test_a_model_that_can_not_be_sent_through_the_proxy_is_refused() -> None:
    from langchain_core.language_models import FakeListChatModel
    from langchain_openai import ChatOpenAI

    wrapper = ms.integrations.langchain.LLMWrapper
    with pytest.raises(ConfigError, match="can't send FakeListChatModel through the proxy"):
        wrapper(FakeListChatModel(responses=["hi"]), proxy_endpoint="http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="'localhost:8400' is not an address"):
        wrapper(ChatOpenAI(model=MODEL, api_key="k"), proxy_endpoint="localhost:8400")  # type: ignore[arg-type]


def team_of(url: str, rollout_id: str | None, **options: Any) -> Any:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.conditions import MaxMessageTermination
    from autogen_agentchat.teams import RoundRobinGroupChat
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    model = OpenAIChatCompletionClient(model=MODEL, base_url=f"{url}/v1", api_key="k", max_retries=0)
    members = [
        AssistantAgent("forecaster", model, tools=[weather], reflect_on_tool_use=True),
        AssistantAgent("critic", model),
    ]
    wrap = ms.integrations.autogen.AutoGenTracer
    traced = [wrap(member, rollout_id=rollout_id) for member in members]
    assert all(isinstance(member, AssistantAgent) for member in traced)
    return RoundRobinGroupChat(traced, termination_condition=MaxMessageTermination(3), **options)


def above(span: Span, trace: ms.TracedRollout) -> list[str]:
    by_id = {s.span_id: s for s in trace.spans}
    names = []
    while span.parent_id:
        span = by_id[span.parent_id]
        names.append(span.name)
    return names


async def test_traced_agents_in_a_team() -> None:
    async with traced() as (tracer, url), tracer.trace() as trace:
        result = await team_of(url, trace.rollout.rollout_id).run(task="the weather in Paris")
    assert result.messages[-1].content == "You asked about Paris"
    turns = [span for span in trace.spans if span.name.startswith("turn ")]
    assert [span.name for span in turns] == ["turn forecaster", "turn critic"]
    told, said = (json.loads(turns[0].attributes[f"agentlightning.operation.{way}"]) for way in ("input", "output"))
    assert told["messages"][0]["content"] == "the weather in Paris"
    kinds = [event.get("type") for event in said]
    assert kinds == ["ToolCallRequestEvent", "ToolCallExecutionEvent", None]
    assert said[-1]["chat_message"]["content"] == "Tool: 21 degrees in Paris"
    calls = of(trace.spans, semconv.LLM, semconv.SOURCE_PROXY)
    assert ["turn forecaster" in above(call, trace) for call in calls] == [True, True, False]
    assert "turn critic" in above(calls[2], trace)
    (tool,) = of(trace.spans, semconv.TOOL, semconv.SOURCE_AGENT)
    assert "turn forecaster" in above(tool, trace)
    assert [(t.agent_name, t.reason) for t in trace.triplets] == [
        ("forecaster", None),
        ("forecaster", None),
        ("critic", None),
    ]


async def test_agents_know_their_rollout_on_a_runtime_that_serves_several() -> None:
    from autogen_core import SingleThreadedAgentRuntime

    runtime = SingleThreadedAgentRuntime(ignore_unhandled_exceptions=False)
    runtime.start()  # its work has no rollout's context
    async with traced() as (tracer, url):

        async def one(city: str) -> ms.TracedRollout:
            async with tracer.trace() as trace:
                team = team_of(url, trace.rollout.rollout_id, runtime=runtime)
                await team.run(task=f"the weather in {city}")
            return trace

        names = ["Paris", "Rome", "Oslo"]
        for trace, city in zip(await asyncio.gather(*map(one, names)), names, strict=True):
            assert trace.status == "succeeded"
            assert len(of(trace.spans, semconv.LLM, semconv.SOURCE_PROXY)) == 3
            asked = [s.attributes[semconv.REQUEST_MESSAGES] for s in of(trace.spans, "llm", "proxy")]
            assert all(f"weather in {city}" in text for text in asked)
            (root,) = [s for s in trace.spans if not s.parent_id]
            assert all(above(s, trace)[-1] == root.name for s in trace.spans if s is not root)
    await runtime.stop()


async def test_an_agent_alone_run_and_streamed() -> None:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    async with traced() as (tracer, url), tracer.trace() as trace:
        model = OpenAIChatCompletionClient(model=MODEL, base_url=f"{url}/v1", api_key="k", max_retries=0)
        alone = ms.integrations.autogen.AutoGenTracer(AssistantAgent("alone", model))
        result = await alone.run(task="the weather in Paris")
        assert result.messages[-1].content == "You asked about Paris"
        streamed = [message async for message in alone.run_stream(task="the weather in Rome")]
        assert streamed[-1].messages[-1].content == "You asked about Rome"
        stray = ms.integrations.autogen.AutoGenTracer(AssistantAgent("stray", model), rollout_id="another")
        with pytest.raises(OutsideRollout, match="agent 'stray': rollout another does not run in this process"):
            await stray.run(task="the weather in Oslo")
    turns = [span for span in trace.spans if span.name == "turn alone"]
    assert len(turns) == 2
    assert [above(call, trace).count("turn alone") for call in of(trace.spans, "llm", "proxy")] == [1, 1]
