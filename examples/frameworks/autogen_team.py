"""AutoGen: a team of two. The forecaster has a tool, the critic has the last word."""

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient

from examples.frameworks.weather import MODEL, question, weather

model = OpenAIChatCompletionClient(model=MODEL, max_retries=0)


async def agent(task: dict[str, str]) -> str:
    forecaster = AssistantAgent("forecaster", model, tools=[weather], reflect_on_tool_use=True)
    critic = AssistantAgent("critic", model)
    team = RoundRobinGroupChat([forecaster, critic], termination_condition=MaxMessageTermination(3))
    result = await team.run(task=question(task["city"])[0]["content"])
    return str(result.messages[-1].content)  # type: ignore[union-attr]
