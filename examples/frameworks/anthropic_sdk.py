"""The Anthropic SDK: plain, streamed, and with a tool. The task selects the way: {"way": "stream", "city": "Paris"}."""

import asyncio
import inspect
from typing import Any

import anthropic

from examples.frameworks.weather import WEATHER_SCHEMA, question, weather

MODEL = "claude-haiku-4-5"
TOOLS: Any = [
    {
        "name": WEATHER_SCHEMA["name"],
        "description": WEATHER_SCHEMA["description"],
        "input_schema": WEATHER_SCHEMA["parameters"],
    }
]

client = anthropic.Anthropic(max_retries=0)
async_client = anthropic.AsyncAnthropic(max_retries=0)


def chat(city: str) -> Any:
    return _text(client.messages.create(model=MODEL, max_tokens=100, messages=question(city)))


async def chat_async(city: str) -> Any:
    return _text(await async_client.messages.create(model=MODEL, max_tokens=100, messages=question(city)))


def stream(city: str) -> Any:
    with client.messages.stream(model=MODEL, max_tokens=100, messages=question(city)) as events:
        return "".join(events.text_stream)


async def stream_async(city: str) -> Any:
    async with async_client.messages.stream(model=MODEL, max_tokens=100, messages=question(city)) as events:
        return "".join([text async for text in events.text_stream])


def tools(city: str) -> Any:
    messages: list[Any] = question(city)
    message = client.messages.create(model=MODEL, max_tokens=100, messages=messages, tools=TOOLS)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": weather(**block.input)}
        for block in message.content
        if block.type == "tool_use"
    ]
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    return _text(client.messages.create(model=MODEL, max_tokens=100, messages=messages, tools=TOOLS))


def _text(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


WAYS = {way.__name__: way for way in (chat, chat_async, stream, stream_async, tools)}


async def agent(task: dict[str, str]) -> Any:
    way = WAYS[task["way"]]
    if inspect.iscoroutinefunction(way):
        return await way(task["city"])
    return await asyncio.to_thread(way, task["city"])
