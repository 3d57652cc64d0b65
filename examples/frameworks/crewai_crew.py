"""CrewAI: a crew of a forecaster with a tool and an editor, who writes the report."""

from typing import Any

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool

from examples.frameworks.weather import MODEL, question
from examples.frameworks.weather import weather as look_up


@tool("weather")
def weather(city: str) -> str:
    """The weather in a city."""
    return look_up(city)


async def agent(task: dict[str, Any]) -> str:
    """Returns the report. {"stream": true} streams the model calls."""
    model = LLM(MODEL, max_retries=0, stream=bool(task.get("stream")))
    given: dict[str, Any] = {"llm": model, "max_retry_limit": 0}
    forecaster = Agent(role="forecaster", goal="Know the weather", backstory="You look.", tools=[weather], **given)
    editor = Agent(role="editor", goal="Write reports", backstory="You are brief.", **given)
    asked = question(task["city"])[0]["content"]
    forecast = Task(description=asked, expected_output="degrees", agent=forecaster)
    report = Task(description=f"Report: {asked}", expected_output="a sentence", agent=editor)
    crew = Crew(name="weather desk", agents=[forecaster, editor], tasks=[forecast, report])
    return str((await crew.kickoff_async()).raw)
