"""Agents that are traced by OpenInference, which they have set up for themselves."""

from typing import Any


async def openai_agent(task: dict[str, Any]) -> float:
    from openinference.instrumentation.openai import OpenAIInstrumentor

    OpenAIInstrumentor().instrument()
    from examples.frameworks.openai_sdk import tools

    return float(task["city"] in tools(task["city"]))


async def langchain_agent(task: dict[str, Any]) -> float:
    from openinference.instrumentation.langchain import LangChainInstrumentor

    LangChainInstrumentor().instrument()
    from examples.frameworks.langchain_agent import agent

    return float(task["city"] in await agent(task))
