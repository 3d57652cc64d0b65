"""No SDK: calls the model over HTTP and runs the tool itself."""

import json
import os
from typing import Any

import httpx

from examples.frameworks.weather import MODEL, WEATHER_SCHEMA, question, weather

client = httpx.Client(base_url=os.environ["OPENAI_BASE_URL"], timeout=60)


def agent(task: dict[str, str]) -> str:
    messages = question(task["city"])
    message = ask(messages)
    messages.append(message)
    for call in message.get("tool_calls") or []:
        result = weather(**json.loads(call["function"]["arguments"]))
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return str(ask(messages)["content"])


def ask(messages: list[Any]) -> dict[str, Any]:
    tools = [{"type": "function", "function": WEATHER_SCHEMA}]
    answer = client.post("/chat/completions", json={"model": MODEL, "messages": messages, "tools": tools})
    answer.raise_for_status()
    message: dict[str, Any] = answer.json()["choices"][0]["message"]
    return message
