"""The OpenAI Agents SDK: a triage agent that hands off to a forecaster with a tool."""

from typing import Any

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool
from openai import AsyncOpenAI

from examples.frameworks.weather import MODEL, question
from examples.frameworks.weather import weather as look_up


@function_tool(failure_error_function=None)
def weather(city: str) -> str:
    """The weather in a city."""
    return look_up(city)


model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(max_retries=0))
settings = ModelSettings(include_usage=True)
forecaster = Agent(name="forecaster", model=model, tools=[weather], model_settings=settings)
triage = Agent(name="triage", model=model, handoffs=[forecaster], model_settings=settings)


async def agent(task: dict[str, Any]) -> str:
    """Returns the answer. {"stream": true} streams the model calls."""
    if not task.get("stream"):
        return str((await Runner.run(triage, question(task["city"]))).final_output)
    result = Runner.run_streamed(triage, question(task["city"]))
    async for _ in result.stream_events():
        pass
    return str(result.final_output)
