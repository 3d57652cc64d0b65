"""Other uses of triplets than reinforcement learning: data sets for fine-tuning, preferences, and prompts.

Each function takes rollouts as lists of whole triplets (`prefixes.expand`) and leaves out what is not trainable. A call
that was given no reward counts with the next one of its rollout, as in training (`credit.turn_rewards`). They raise
`CodecError` naming rollout and turn if a text does not hold messages.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from millstream.pipeline.algorithms.credit import turn_rewards
from millstream.schemas.errors import CodecError
from millstream.schemas.wire.records import Triplet

Rollout = Sequence[Triplet]


def messages(rollouts: Iterable[Rollout], min_reward: float | None = None) -> Iterator[dict[str, Any]]:
    """An example of OpenAI's fine-tuning format for each call that earned ``min_reward``: its prompt, its answer, its
    tools. Earlier answers within the prompt have weight 0, so that each is learnt once."""
    for triplet, reward in _rewarded(rollouts):
        if min_reward is None or reward >= min_reward:
            prompt = [m | {"weight": 0} if m["role"] == "assistant" else m for m in _messages(triplet, "prompt")]
            yield {"messages": [*prompt, *_messages(triplet, "response")], **_tools(triplet)}


def preferences(rollouts: Iterable[Rollout]) -> Iterator[dict[str, Any]]:
    """A pair of OpenAI's preference format for each prompt that several calls of a group share: the answers that earned
    most and least, if those differ."""
    asked: dict[tuple[str, str], list[tuple[float, Triplet]]] = {}
    for triplet, reward in _rewarded(rollouts):
        asked.setdefault((triplet.group_id, triplet.prompt), []).append((reward, triplet))
    for answers in asked.values():
        (least, worst), (most, best) = min(answers, key=lambda a: a[0]), max(answers, key=lambda a: a[0])
        if most > least and best.response != worst.response:
            yield {
                "input": {"messages": _messages(best, "prompt"), **_tools(best)},
                "preferred_output": _messages(best, "response"),
                "non_preferred_output": _messages(worst, "response"),
            }


def texts(rollouts: Iterable[Rollout]) -> Iterator[str]:
    """What a person or a model that improves prompts reads: each call of a rollout as a dialogue, with its reward."""
    for rollout in rollouts:
        parts = []
        for triplet, reward in _rewarded([rollout]):
            both = _messages(triplet, "prompt") + _messages(triplet, "response")
            said = [f"{m['role']}: {_text(m)}" for m in both]
            parts.append("\n".join([f"## Call {triplet.turn}", *said, f"reward: {reward:g}"]))
        if parts:
            yield "\n\n".join(parts)


def _rewarded(rollouts: Iterable[Rollout]) -> Iterator[tuple[Triplet, float]]:
    for rollout in rollouts:
        rewards = turn_rewards([(triplet.turn, triplet.reward) for triplet in rollout])
        yield from ((triplet, rewards[triplet.turn]) for triplet in rollout if triplet.trainable)


def _tools(triplet: Triplet) -> dict[str, Any]:
    return {"tools": [_tool(tool) for tool in json.loads(triplet.tools)]} if triplet.tools else {}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """In the form of chat completions; elsewhere a tool's fields stand at its top."""
    if "function" in tool:
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _messages(triplet: Triplet, field: Literal["prompt", "response"]) -> list[dict[str, Any]]:
    """Messages (a list, or one) in OpenAI's form; those of the semantic conventions hold their content in parts."""
    try:
        found = json.loads(getattr(triplet, field))
        return [_openai(message) for message in (found if isinstance(found, list) else [found])]
    except (ValueError, KeyError, TypeError) as error:
        raise CodecError(
            f"rollout {triplet.rollout_id}, turn {triplet.turn}: its {field} holds no messages that are known here "
            f"({type(error).__name__}: {error})",
            record="Triplet",
            field=field,
        ) from error


def _openai(message: dict[str, Any]) -> dict[str, Any]:
    if "parts" not in message:
        kept = {name: value for name, value in message.items() if value is not None or name == "content"}
        return {"role": kept.pop("role"), **kept}
    parts = message["parts"]
    answers = [part for part in parts if part["type"] == "tool_call_response"]
    if answers:
        result = _json(answers[0].get("response", answers[0].get("result")))
        return {"role": "tool", "tool_call_id": answers[0].get("id", ""), "content": result}
    calls = [
        {
            "id": part.get("id", ""),
            "type": "function",
            "function": {"name": part["name"], "arguments": _json(part.get("arguments"))},
        }
        for part in parts
        if part["type"] == "tool_call"
    ]
    said = "".join(part["content"] for part in parts if part["type"] == "text")
    return {"role": message["role"], "content": said or None, **({"tool_calls": calls} if calls else {})}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    said = content if isinstance(content, str) else json.dumps(content) if content else ""
    calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls") or ()]
    return " ".join(part for part in (said, *calls) if part)
