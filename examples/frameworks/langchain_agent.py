"""LangChain: a ready-made agent with a tool."""

from typing import Any

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from examples.frameworks.weather import MODEL, question
from examples.frameworks.weather import weather as look_up


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return look_up(city)


forecaster = create_agent(ChatOpenAI(model=MODEL, max_retries=0), [weather], name="forecaster")


async def agent(task: dict[str, str]) -> str:
    result: Any = await forecaster.ainvoke({"messages": question(task["city"])})
    return str(result["messages"][-1].content)
