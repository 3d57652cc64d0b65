"""Triplets as data sets for other methods than reinforcement learning: fine-tuning, preferences, prompts.

The functions take rollouts as lists of whole triplets (`prefixes.expand`) and leave out what is not trainable. A call
without a reward gets the next one of its rollout, as in training (`estimators.turn_rewards`). They raise `CodecError`
with rollout and turn if a text does not hold messages.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

from millstream.consumers.adapter.training_rules import NO_TOKENS
from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import Progress, read_to_end
from millstream.pipeline.algorithms.estimators import turn_rewards
from millstream.producers.blob_store import Blobs
from millstream.schemas.errors import CodecError
from millstream.schemas.spans.text import json_text, parsed
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.prefixes import expand
from millstream.schemas.wire.records import Triplet
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)

Rollout = Sequence[Triplet]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which answers of which rollouts are examples. Of trainable answers alone."""

    min_reward: float | None = None  # that the call has earned
    best_of_group: int = 0  # the rollouts of a group that earned the most in all; 0: all of them


@dataclass(frozen=True, slots=True)
class PairChoice:
    """Which answers of a group to one prompt are compared. Of trainable answers alone."""

    margin: float = 0.0  # rewards of a pair differ by more
    every: bool = False  # every two of them, not the best and the worst alone


Rewarded = tuple[Triplet, float]  # with what its call has earned


def chosen(rollouts: Sequence[Rollout], choice: Choice) -> list[Rewarded]:
    """The answers that are examples, with what each has earned (`estimators.turn_rewards`). Of rollouts that earned
    alike the first come first."""
    if choice.best_of_group:
        groups: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            if any(triplet.trainable for triplet in rollout):
                groups.setdefault(rollout[0].group_id, []).append(rollout)
        best = [sorted(members, key=_earned, reverse=True)[: choice.best_of_group] for members in groups.values()]
        rollouts = [rollout for members in best for rollout in members]
    least = choice.min_reward
    return [(triplet, reward) for triplet, reward in _rewarded(rollouts) if least is None or reward >= least]


def _earned(rollout: Rollout) -> float:
    return sum(triplet.reward or 0.0 for triplet in rollout)


async def read_rollouts(
    log: Log,
    topics: Topics,
    experiment: str | None,
    mode: str | None,
    topic: str | None = None,
    progress: Progress | None = None,
) -> list[list[Triplet]]:
    """The triplets that the log still holds, with whole prompts, by rollout. ``topic``: one that a replay has written,
    in place of that of triplets. ``progress``: see `read_to_end`."""
    found: dict[str, list[Triplet]] = {}
    partitions = [Partition(topic or topics.triplets, number) for number in range(topics.partitions)]
    async for record in read_to_end(log, partitions, progress=progress):
        try:
            value = codec.decode(record.value)
        except CodecError as error:
            logger.warning("%s is left out: %s", record.place, error)
            continue
        if isinstance(value, Triplet) and mode in (None, value.mode) and experiment in (None, value.experiment_id):
            found.setdefault(value.rollout_id, []).append(value)
    return [whole for triplets in found.values() if (whole := _expanded(triplets))]


def _expanded(triplets: list[Triplet]) -> list[Triplet]:
    """None of them if one is missing."""
    try:
        return expand(triplets)
    except ValueError as error:
        logger.warning("left out: %s", error)
        return []


def why_none(rollouts: Sequence[Rollout], searched: str) -> str:
    """Why these rollouts make no examples, and what to do. ``searched`` says how they were chosen."""
    triplets = [triplet for rollout in rollouts for triplet in rollout]
    if not triplets:
        return f"the log holds no triplets of {searched}; `millstream rollouts` lists what there is"
    reasons = Counter(triplet.reason or "no reason given" for triplet in triplets if not triplet.trainable)
    if reasons.total() < len(triplets):
        return f"no call of the {len(triplets)} of {searched} fits the other conditions, such as rewards that differ"
    listed = "; ".join(f"{reason} ({count} calls)" for reason, count in reasons.most_common())
    cure = ""
    if any(NO_TOKENS in reason for reason in reasons):
        cure = (
            ". These data sets need no token ids: set require_tokens = false under [triplets] in the adapter's "
            "millstream.toml, and run the tasks again"
        )
    return f"none of the {len(triplets)} calls of {searched} is trainable: {listed}{cure}"


def with_contents(triplet: Triplet, blobs: Blobs) -> Triplet:
    """The triplet with its long contents in place of the references to them. Raises `BlobError`."""
    tools = None if triplet.tools is None else blobs.whole(triplet.tools)
    return replace(triplet, prompt=blobs.whole(triplet.prompt), response=blobs.whole(triplet.response), tools=tools)


def messages(
    rollouts: Iterable[Rollout], choice: Choice = Choice(), merge_turns: bool = False
) -> Iterator[dict[str, Any]]:
    """An example in OpenAI's fine-tuning format for each call that is chosen: its prompt, answer and tools. Earlier
    answers within the prompt have weight 0, so that each is trained on once. ``merge_turns``: an example for each
    conversation, where chosen answers have no weight, as for trainers that learn every answer."""
    last: dict[str, Any] | None = None
    rollout_id = ""
    for triplet, _ in chosen(list(rollouts), choice):
        prompt = [m | {"weight": 0} if m["role"] == "assistant" else m for m in conversation(triplet, "prompt")]
        example = {"messages": [*prompt, *conversation(triplet, "response")], **tools_of(triplet)}
        if last is not None and rollout_id == triplet.rollout_id and _continues(example, last):
            example["messages"][: len(last["messages"])] = last["messages"]
        elif last is not None:
            yield last
        last, rollout_id = example, triplet.rollout_id
        if not merge_turns:
            yield last
            last = None
    if last is not None:
        yield last


def _continues(example: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether its messages begin with all of the other's, and its tools are the same."""
    before = example["messages"][: len(last["messages"])]
    return example.get("tools") == last.get("tools") and _unweighted(before) == _unweighted(last["messages"])


def with_object_arguments(example: dict[str, Any]) -> dict[str, Any]:
    """One of the `messages`, as a trainer takes it that gives it to a chat template unchanged; see `for_template`."""
    return example | {"messages": list(map(for_template, example["messages"]))}


def for_template(message: dict[str, Any]) -> dict[str, Any]:
    """Chat templates take the arguments of tool calls as objects. What is not JSON stays a string."""
    calls = [
        call | {"function": call["function"] | {"arguments": _object(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return message | ({"tool_calls": calls} if calls else {})


def _object(arguments: str) -> Any:
    try:
        return parsed(arguments)
    except ValueError:
        return arguments


def _unweighted(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in message.items() if name != "weight"} for message in messages]


def pairs(rollouts: Iterable[Rollout], choice: PairChoice = PairChoice()) -> Iterator[tuple[Rewarded, Rewarded]]:
    """The better and the worse answer of each pair. Equal answers are none."""
    asked: dict[tuple[str, str], list[Rewarded]] = {}
    for triplet, reward in _rewarded(rollouts):
        asked.setdefault((triplet.group_id, triplet.prompt), []).append((triplet, reward))
    for answers in asked.values():
        ranked = sorted(answers, key=lambda answer: -answer[1])
        for better, worse in combinations(ranked, 2) if choice.every else [(ranked[0], ranked[-1])]:
            if better[1] - worse[1] > choice.margin and better[0].response != worse[0].response:
                yield better, worse


def preferences(rollouts: Iterable[Rollout], choice: PairChoice = PairChoice()) -> Iterator[dict[str, Any]]:
    """Each of the `pairs` in OpenAI's preference format."""
    for (better, _), (worse, _) in pairs(rollouts, choice):
        yield {
            "input": {"messages": conversation(better, "prompt"), **tools_of(better)},
            "preferred_output": conversation(better, "response"),
            "non_preferred_output": conversation(worse, "response"),
        }


def texts(rollouts: Iterable[Rollout]) -> Iterator[str]:
    """Each rollout as dialogues with their rewards, for people and for models that improve prompts."""
    for rollout in rollouts:
        parts = []
        for triplet, reward in _rewarded([rollout]):
            both = conversation(triplet, "prompt") + conversation(triplet, "response")
            said = [f"{m['role']}: {_text(m)}" for m in both]
            parts.append("\n".join([f"## Call {triplet.turn}", *said, f"reward: {reward:g}"]))
        if parts:
            yield "\n\n".join(parts)


def _rewarded(rollouts: Iterable[Rollout]) -> Iterator[Rewarded]:
    for rollout in rollouts:
        rewards = turn_rewards([(triplet.turn, triplet.reward) for triplet in rollout])
        yield from ((triplet, rewards[triplet.turn]) for triplet in rollout if triplet.trainable)


def tools_of(triplet: Triplet) -> dict[str, Any]:
    """``tools`` as chat completions have them; empty without any."""
    return {"tools": [_tool(tool) for tool in parsed(triplet.tools)]} if triplet.tools else {}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """In the form of chat completions; in other APIs the fields of ``function`` are at the top."""
    if "function" in tool:
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def conversation(triplet: Triplet, field: Literal["prompt", "response"]) -> list[dict[str, Any]]:
    """Messages (a list, or one) in OpenAI's form; those of the semantic conventions have their content in parts."""
    try:
        found = parsed(getattr(triplet, field))
        return [_openai(message) for message in (found if isinstance(found, list) else [found])]
    except (ValueError, KeyError, TypeError) as error:
        raise CodecError(
            f"rollout {triplet.rollout_id}, turn {triplet.turn}: its {field} is not in a known form of messages "
            f"({type(error).__name__}: {error})"
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
    return value if isinstance(value, str) else json_text(value)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    said = content if isinstance(content, str) else json_text(content) if content else ""
    calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls") or ()]
    return " ".join(part for part in (said, *calls) if part)
