"""A judge without a model, so that the demo needs no key and is the same everywhere. It knows which tool a phrase asks
for; the agent does not. It answers both kinds of questions: about one answer, and about those of a whole group."""

import random
import re
from typing import Any, Final

from aiohttp import web

PHRASES: Final = {
    "add": ("add {y} to {x} ?", "{x} plus {y} ?", "the sum of {x} and {y} ?"),
    "subtract": ("subtract {y} from {x} ?", "{x} minus {y} ?", "take {y} from {x} ?"),
    "multiply": ("multiply {x} by {y} ?", "scale {x} by {y} ?", "the product of {x} and {y} ?"),
}
SIGNS: Final = {
    "add": r"\b(add|plus|sum)\b",
    "subtract": r"\b(subtract|minus|take)\b",
    "multiply": r"\b(multiply|scale|product)\b",
}
ANSWER: Final = re.compile(r"<answer (?:(\d+) )?\w{16}>\n(.*?)\n</answer", re.DOTALL)


def tasks(validation: bool, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Validation has pairs of numbers that training never sees."""
    drawn = random.Random(f"{seed} {validation}")  # noqa: S311 - tasks, not secrets
    pairs = [(x, y) for x in range(1, 10) for y in range(1, 10) if ((x + 2 * y) % 5 == 0) == validation]
    questions = [phrase.format(x=x, y=y) for phrases in PHRASES.values() for phrase in phrases for x, y in pairs]
    return [{"question": question} for question in drawn.sample(questions, count)]


def score(question: str, answer: str) -> float:
    """1 for the tool that the question asks for, a little for any other tool."""
    if answer not in SIGNS:
        return 0.0
    return 1.0 if re.search(SIGNS[answer], question) else 0.125


def verdict(asked: str) -> str:
    """What the judge says to a question of `ms.Judge` or `ms.Rubric`."""
    task = asked.partition("Task:\n")[2].partition("\n\n")[0]
    shown = [(number, text.removeprefix("assistant: ")) for number, text in ANSWER.findall(asked) if number != "0"]
    lines = [f"Score{number and f' {number}'}: {score(task, text)} - it says {text!r}" for number, text in shown]
    return "\n".join(lines)


def app() -> web.Application:
    async def chat(request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        message = {"role": "assistant", "content": verdict(body["messages"][-1]["content"])}
        return web.json_response(
            {
                "id": "chatcmpl-scripted",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
        )

    served = web.Application(client_max_size=64 << 20)
    served.add_routes([web.post("/v1/chat/completions", chat)])
    return served
