"""The OpenAI Agents SDK: a triage agent that hands over to a forecaster with a tool."""

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool
from openai import AsyncOpenAI

from examples.frameworks.weather import MODEL, question
from examples.frameworks.weather import weather as look_up


@function_tool(failure_error_function=None)
def weather(city: str) -> str:
    """The weather in a city."""
    return look_up(city)


model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(max_retries=0))
forecaster = Agent(name="forecaster", model=model, tools=[weather], model_settings=ModelSettings(temperature=0.5))
triage = Agent(name="triage", model=model, handoffs=[forecaster])


async def agent(task: dict[str, str]) -> str:
    result = await Runner.run(triage, question(task["city"]))
    return str(result.final_output)
