"""Shared by the agents of this folder: the question, the tool that answers it, and the model."""

from typing import Any

MODEL = "gpt-4o-mini"
WEATHER_SCHEMA = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def question(city: str) -> list[Any]:
    return [{"role": "user", "content": f"How is the weather in {city}?"}]


def weather(city: str) -> str:
    """The weather in a city."""
    if city == "Atlantis":
        raise ValueError("there is no Atlantis")
    return f"21 degrees in {city}"
