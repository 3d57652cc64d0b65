"""A model server without a model: what it answers is written down here, so that the demo is the same on each machine.

The student knows every answer, but gives it as the prompt asks: with the unit unless it is to give the number alone,
in kilometres unless it is to convert to metres, with two decimals unless it is to round. The critic compares answers
with rewards, and names one of these rules; the editor adds it. Nothing here knows which prompt is best.
"""

import asyncio
import json
import re
from typing import Any, Final

from aiohttp import web

RULES: Final = {
    "number alone": "Answer with the number alone.",
    "metres": "Convert to metres.",
    "round": "Always round to a whole number.",
}
FIRST: Final = "You answer questions about {topic}."
USELESS: Final = "It could be friendlier."


def tasks(first: int, count: int) -> list[dict[str, str]]:
    """A third of them needs each rule; all need the number alone."""
    found = []
    for n in range(first, first + count):
        km = n % 7 + 2
        question, answer = (
            (f"How many km are {km} km?", f"{km}.00"),
            (f"How long is a road of {km} km?", f"{km * 1000}.00"),
            (f"How long is a road of {km} km, roughly?", f"{km * 1000}"),
        )[n % 3]
        found.append({"question": question, "answer": answer, "id": str(n)})
    return found


def student(system: str, question: str) -> str:
    km = int(re.findall(r"(\d+) km\b", question)[0])
    metres = RULES["metres"] in system and "road" in question
    number = km * 1000 if metres else km
    text = f"{number}" if RULES["round"] in system and "roughly" in question else f"{number}.00"
    return text if RULES["number alone"] in system else f"That is {text} {'m' if metres else 'km'}."


def critic(seen: str) -> str:
    """Looks at the first rollout that earned nothing, and at what the prompt asks for already."""
    prompt = seen.partition("</prompt>")[0]
    failed = [part for part in seen.split("\n\nRollout ") if "Reward: 0" in part]
    for rule, words in RULES.items():
        needs = {"number alone": "km", "metres": "road", "round": "roughly"}[rule]
        if words not in prompt and any(needs in part for part in failed):
            return f"Some answers are not what was asked for. Add: {words}"
    return USELESS


def editor(asked: str) -> str:
    before, _, review = asked.rpartition("Review:\n")
    (prompt,) = re.findall(r"<prompt>\n(.*?)\n</prompt>", before, re.DOTALL)
    added = review.partition("Add: ")[2] or "Be friendly."
    return f"<prompt>\n{prompt} {added}\n</prompt>"


def app(answer_s: float = 0.0, control: bool = False) -> web.Application:
    """``control``: the critic says nothing that helps. ``answer_s``: seconds that an answer takes."""

    async def chat(request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        first, last = body["messages"][0]["content"], body["messages"][-1]["content"]
        await asyncio.sleep(answer_s)
        if body["model"] == "student":
            text = student(first, last)
        elif "Review:\n" in last:
            text = editor(last)
        else:
            text = USELESS if control else critic(last)
        counts = len(json.dumps(body["messages"])) // 4, len(text) // 4
        return web.json_response(
            {
                "id": "chatcmpl-scripted",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)},
            }
        )

    served = web.Application(client_max_size=64 << 20)
    served.add_routes([web.post("/v1/chat/completions", chat)])
    return served
