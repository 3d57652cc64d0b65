"""Agents of all frameworks at once: each task names one, and the way it is run. They begin together."""

import asyncio
import json
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from examples.frameworks import (
    anthropic_sdk,
    autogen_team,
    langchain_agent,
    langgraph_agent,
    openai_agents,
    openai_sdk,
    plain_http,
)
from examples.frameworks.weather import MODEL, question

AT_ONCE = 50
WAIT_S = 60.0
here = threading.Barrier(AT_ONCE)
arrived = 0
complete = asyncio.Event()

executor = ThreadPoolExecutor(4)
executor.submit(int).result()  # its first thread belongs to no attempt


def in_thread(city: str) -> Any:
    answers: queue.Queue[Any] = queue.Queue()
    thread = threading.Thread(target=lambda: answers.put(openai_sdk.tools(city)))
    thread.start()
    thread.join()
    return answers.get_nowait()


def in_timer(city: str) -> Any:
    answers: queue.Queue[Any] = queue.Queue()
    timer = threading.Timer(0, lambda: answers.put(openai_sdk.chat(city)))
    timer.start()
    timer.join()
    return answers.get_nowait()


def in_generator(city: str) -> list[Any]:
    def steps() -> Any:
        for _ in range(2):
            yield openai_sdk.chat(city)

    return list(steps())


async def in_async_generator(city: str) -> list[Any]:
    async def steps() -> Any:
        for _ in range(2):
            yield await openai_sdk.chat_async(city)

    return [step async for step in steps()]


async def in_tasks(city: str) -> list[Any]:
    return await asyncio.gather(*(openai_sdk.chat_async(city) for _ in range(3)))


def in_nested_loop(city: str) -> Any:
    """A loop of its own, and in it a thread again."""

    async def inside() -> list[Any]:
        async with openai.AsyncOpenAI() as client:
            answer = await client.chat.completions.create(model=MODEL, messages=question(city))
        return [answer.choices[0].message.content, await asyncio.to_thread(openai_sdk.chat, city)]

    return asyncio.run(inside())


ASYNC = {
    "autogen": lambda city: autogen_team.agent({"city": city}),
    "langchain": lambda city: langchain_agent.agent({"city": city}),
    "openai-agents": lambda city: openai_agents.agent({"city": city}),
    "anthropic": lambda city: anthropic_sdk.agent({"city": city, "way": "stream_async"}),
    "async generator": in_async_generator,
    "tasks": in_tasks,
}
SYNC = {
    "langgraph": lambda city: langgraph_agent.agent({"city": city}),
    "plain http": lambda city: plain_http.agent({"city": city}),
    "anthropic tools": anthropic_sdk.tools,
    "thread": in_thread,
    "timer": in_timer,
    "generator": in_generator,
    "nested loop": in_nested_loop,
}


async def agent(task: dict[str, str]) -> Any:
    global arrived
    arrived += 1
    if arrived == AT_ONCE:
        complete.set()
    await asyncio.wait_for(complete.wait(), WAIT_S)
    way, city = task["way"], task["city"]
    if way in ASYNC:
        return await ASYNC[way](city)  # type: ignore[no-untyped-call]
    if len(city) % 2:
        return await asyncio.to_thread(SYNC[way], city)
    return await asyncio.wrap_future(executor.submit(SYNC[way], city))


def sync_agent(task: dict[str, str]) -> Any:
    """In a thread of its own for each attempt."""
    here.wait(WAIT_S)
    return json.dumps(SYNC[task["way"]](task["city"]))
