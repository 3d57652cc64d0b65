"""A calculator that asks a model which tool to use: plain code on the OpenAI SDK, unaware of training."""

from typing import Any

import openai

from examples.calculator.reward import score, tool_called
from examples.calculator.tools import TOOLS

client = openai.OpenAI()


def agent(task: dict[str, Any], rollout: Any = None) -> int:
    """Works a question out, step by step; returns the number it arrives at."""
    result, *operands = task["numbers"]
    messages: list[Any] = []
    for step, part in enumerate(task["question"].split(" then ")):
        asked = f"result {result} . then {part} ?" if step else f"{part} ?"
        messages.append({"role": "user", "content": asked})
        completion = client.chat.completions.create(model="calculator", messages=messages, max_tokens=1)
        word = (completion.choices[0].message.content or "").strip()
        tool_called(word, known=word in TOOLS)
        if word in TOOLS:
            result = TOOLS[word](result, operands[step])
        score(step, word == task["tools"][step], rollout)
        messages.append({"role": "assistant", "content": word})
    return result
