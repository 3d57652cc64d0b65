"""The calculator in LangGraph: one node asks the model for a tool, another calls it, until all steps are done."""

from typing import Annotated, Any, TypedDict

from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages

from examples.calculator.reward import score
from examples.calculator.tools import TOOLS

SYSTEM = SystemMessage("choose a tool")


class State(TypedDict):
    task: dict[str, Any]
    rollout: Any
    messages: Annotated[list[AnyMessage], add_messages]
    result: int
    step: int


model = ChatOpenAI(model="calculator", max_tokens=1)  # type: ignore[call-arg] # an alias
tools = {name: tool(function) for name, function in TOOLS.items()}


def choose(state: State) -> dict[str, Any]:
    return {"messages": [model.invoke([SYSTEM, *state["messages"]])]}


def call(state: State) -> dict[str, Any]:
    """Calls the tool that the model named; an unknown word does nothing."""
    task, step, result = state["task"], state["step"], state["result"]
    word = state["messages"][-1].text
    if word in tools:
        result = tools[word].invoke({"a": result, "b": task["numbers"][step + 1]})
    score(step, word == task["tools"][step], state["rollout"])
    following = task["question"].split(" then ")[step + 1 :][:1]
    messages = [HumanMessage(f"result {result} . then {part} ?") for part in following]
    return {"result": result, "step": step + 1, "messages": messages}


def more(state: State) -> str:
    return "choose" if state["step"] < len(state["task"]["tools"]) else END


graph = StateGraph(State)
graph.add_node("choose", choose)
graph.add_node("call", call)
graph.add_edge(START, "choose")
graph.add_edge("choose", "call")
graph.add_conditional_edges("call", more)
calculator = graph.compile(name="calculator")


def agent(task: dict[str, Any], rollout: Any = None) -> int:
    """Works a question out, step by step; returns the number it arrives at."""
    first, *_ = task["question"].split(" then ")
    question = [HumanMessage(f"{first} ?")]
    begin = {"task": task, "rollout": rollout, "messages": question, "result": task["numbers"][0], "step": 0}
    return int(calculator.invoke(begin)["result"])  # type: ignore[call-overload]
