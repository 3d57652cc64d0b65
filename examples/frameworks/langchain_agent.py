"""LangChain: a prebuilt agent with a tool."""

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


model = ChatOpenAI(model=MODEL, max_retries=0, stream_usage=True)
forecaster = create_agent(model, [weather], name="forecaster")


async def agent(task: dict[str, Any]) -> str:
    """Returns the answer. {"stream": true} joins it from streamed chunks."""
    asked: Any = {"messages": question(task["city"])}
    if not task.get("stream"):
        return str((await forecaster.ainvoke(asked))["messages"][-1].content)
    words = [message async for message, _ in forecaster.astream(asked, stream_mode="messages")]
    return "".join(word.text for word in words if word.type == "AIMessageChunk")
