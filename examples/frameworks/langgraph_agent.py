"""LangGraph: a custom graph. The planner calls the tool, the reporter writes the answer."""

from typing import Annotated, Any, TypedDict

from langchain_core.messages import AnyMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode

from examples.frameworks.weather import MODEL, question
from examples.frameworks.weather import weather as look_up


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return look_up(city)


model = ChatOpenAI(model=MODEL, max_retries=0, stream_usage=True)
planning = model.bind_tools([weather])


def planner(state: State) -> dict[str, Any]:
    return {"messages": [planning.invoke(state["messages"])]}


def reporter(state: State) -> dict[str, Any]:
    return {"messages": [model.invoke(state["messages"])]}


def made() -> Any:
    graph = StateGraph(State)
    graph.add_node("planner", planner)
    graph.add_node("tools", ToolNode([weather], handle_tool_errors=False))
    graph.add_node("reporter", reporter)
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "tools")
    graph.add_edge("tools", "reporter")
    graph.add_edge("reporter", END)
    return graph.compile(name="forecast")


graph = made()


def agent(task: dict[str, Any]) -> str:
    """Returns the answer. {"stream": true} joins it from streamed chunks."""
    asked = {"messages": question(task["city"])}
    if not task.get("stream"):
        return str(graph.invoke(asked)["messages"][-1].content)
    words = [message for message, _ in graph.stream(asked, stream_mode="messages")]
    return "".join(word.text for word in words if word.type == "AIMessageChunk")
