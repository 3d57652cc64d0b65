"""AutoGen: a team of a forecaster with a tool and a critic, who writes the last message."""

from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient

from examples.frameworks.weather import MODEL, question, weather

plain = OpenAIChatCompletionClient(model=MODEL, max_retries=0)
streaming = OpenAIChatCompletionClient(model=MODEL, max_retries=0, stream_options={"include_usage": True})


async def agent(task: dict[str, Any]) -> str:
    """Returns the last message. {"stream": true} streams the model calls."""
    stream = bool(task.get("stream"))
    model = streaming if stream else plain
    forecaster = AssistantAgent(
        "forecaster", model, tools=[weather], reflect_on_tool_use=True, model_client_stream=stream
    )
    critic = AssistantAgent("critic", model, model_client_stream=stream)
    team = RoundRobinGroupChat([forecaster, critic], termination_condition=MaxMessageTermination(3))
    result = await team.run(task=question(task["city"])[0]["content"])
    return str(result.messages[-1].content)  # type: ignore[union-attr]
