"""An agent whose prompt is a resource: ordinary OpenAI-SDK code."""

from typing import Any

import millstream as ms


def agent(task: dict[str, Any], resources: dict[str, Any]) -> float:
    """Returns its reward: 1 for the exact answer."""
    system = resources["system"].format(topic="lengths")
    answer = ms.openai_client().chat.completions.create(
        model="student",
        messages=[{"role": "system", "content": system}, {"role": "user", "content": task["question"]}],
    )
    return float(answer.choices[0].message.content == task["answer"])
