"""A model server in OpenAI's form, whose answers a function writes; and a task that the right prompt solves.

Each task needs one rule in the prompt. A critic that reads the rollouts names a rule that is missing; an editor adds
it. `useless` never says anything that helps.
"""

import re
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from millstream.pipeline.services.serve_aiohttp import serve
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.config.upstreams import Upstream

RULES = ("use units", "one line", "show work", "cite tools")
TASKS = [{"needs": RULES[n % 4], "n": n} for n in range(12)]
VAL_TASKS = [{"needs": RULES[n % 4], "n": 100 + n} for n in range(8)]
FIRST = "Answer {question}."
TOKENS = 10  # that each answer says it took: as many again for its prompt

Reply = Callable[[list[dict[str, str]]], str]


def agent(task: dict[str, Any], resources: dict[str, Any]) -> float:
    """Deterministic: right if the prompt has the task's rule."""
    return float(task["needs"] in resources["system"].format(question="?"))


def blind(task: dict[str, Any], resources: dict[str, Any]) -> float:
    """A control: what it earns has nothing to do with the prompt's rules."""
    return float(zlib.crc32(f"{task['n']} {resources['system'].template}".encode()) % 2)


def helpful(messages: list[dict[str, str]]) -> str:
    said = messages[-1]["content"]
    if "Review:" in said:
        prompt, _, review = said.rpartition("Review:\n")
        now = re.findall(r"<prompt>\n(.*?)\n</prompt>", prompt, re.DOTALL)[0]
        return f"Here it is.\n<prompt>\n{now} {review.removeprefix('add: ')}.\n</prompt>"
    missing = [rule for rule in RULES if re.search(rf'"needs": ?"{rule}"[^\n]*\nReward: 0', said)]
    return f"add: {missing[0]}" if missing else "add: be kind"


def useless(messages: list[dict[str, str]]) -> str:
    return "<prompt>\nBe helpful: {question}\n</prompt>" if "Review:" in messages[-1]["content"] else "be helpful"


class WriterServer:
    def __init__(self, reply: Reply = helpful) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.refuse = 0  # so many requests, with 400
        self.app = web.Application(client_max_size=64 << 20)
        self.app.add_routes([web.post("/v1/chat/completions", self.chat)])

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        if self.refuse:
            self.refuse -= 1
            return web.json_response(
                {"error": {"message": "no such model", "type": "invalid_request_error"}}, status=400
            )
        message = {"role": "assistant", "content": self.reply(body["messages"])}
        answer = {
            "id": f"chatcmpl-{len(self.requests)}",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": TOKENS, "completion_tokens": TOKENS, "total_tokens": 2 * TOKENS},
        }
        return web.json_response(answer)

    @property
    def critiques(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.requests if "Review:" not in str(body)]


@asynccontextmanager
async def writing(reply: Reply = helpful, **given: Any) -> AsyncIterator[tuple[WriterServer, Settings]]:
    """A server, and settings whose proxy reaches it as the model "critic"."""
    server = WriterServer(reply)
    async with serve(server.app, "http://127.0.0.1:0") as url:
        upstreams = {"writers": Upstream(urls=(url,), kind="openai")}
        yield server, load_settings(upstreams=upstreams, routes={"critic": "writers"}, **given)
