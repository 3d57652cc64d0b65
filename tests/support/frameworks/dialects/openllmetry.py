"""Agents that are traced by OpenLLMetry, which they have set up for themselves."""

from typing import Any


async def openai_agent(task: dict[str, Any]) -> float:
    from opentelemetry.instrumentation.openai import OpenAIInstrumentor

    OpenAIInstrumentor().instrument()
    from examples.frameworks.openai_sdk import tools

    return float(task["city"] in tools(task["city"]))


async def langchain_agent(task: dict[str, Any]) -> float:
    from opentelemetry.instrumentation.langchain import LangchainInstrumentor

    LangchainInstrumentor().instrument()
    from examples.frameworks.langchain_agent import agent

    return float(task["city"] in await agent(task))
