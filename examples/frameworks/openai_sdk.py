"""The OpenAI SDK, called in each of its ways. The task selects one: {"way": "stream", "city": "Paris"}."""

import asyncio
import inspect
import json
from typing import Any

import openai
from pydantic import BaseModel

from examples.frameworks.weather import MODEL, WEATHER_SCHEMA, question, weather

client = openai.OpenAI(max_retries=0)
async_client = openai.AsyncOpenAI(max_retries=0)


class Forecast(BaseModel):
    city: str
    degrees: int


def chat(city: str) -> Any:
    completion = client.chat.completions.create(model=MODEL, messages=question(city))
    return completion.choices[0].message.content


async def chat_async(city: str) -> Any:
    completion = await async_client.chat.completions.create(model=MODEL, messages=question(city))
    return completion.choices[0].message.content


def stream(city: str) -> Any:
    options: Any = {"stream_options": {"include_usage": True}}
    chunks = client.chat.completions.create(model=MODEL, messages=question(city), stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def stream_async(city: str) -> Any:
    options: Any = {"stream_options": {"include_usage": True}}
    chunks = await async_client.chat.completions.create(model=MODEL, messages=question(city), stream=True, **options)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])


def parse(city: str) -> Any:
    completion = client.chat.completions.parse(model=MODEL, messages=question(city), response_format=Forecast)
    return completion.choices[0].message.parsed


def responses(city: str) -> Any:
    return client.responses.create(model=MODEL, input=question(city)[0]["content"]).output_text


async def responses_async(city: str) -> Any:
    return (await async_client.responses.create(model=MODEL, input=question(city)[0]["content"])).output_text


def tools(city: str) -> Any:
    """Calls the tool that the model requests and sends the result back."""
    messages: list[Any] = question(city)
    offered: Any = [{"type": "function", "function": WEATHER_SCHEMA}]
    message = client.chat.completions.create(model=MODEL, messages=messages, tools=offered).choices[0].message
    messages.append(message)
    for call in message.tool_calls or []:
        if call.type == "function":
            result = weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return client.chat.completions.create(model=MODEL, messages=messages, tools=offered).choices[0].message.content


WAYS = {way.__name__: way for way in (chat, chat_async, stream, stream_async, parse, responses, responses_async, tools)}


async def agent(task: dict[str, str]) -> Any:
    way = WAYS[task["way"]]
    if inspect.iscoroutinefunction(way):
        return await way(task["city"])
    return await asyncio.to_thread(way, task["city"])
