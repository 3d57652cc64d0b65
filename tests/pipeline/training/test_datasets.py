"""Triplets as data sets: OpenAI's fine-tuning and preference formats, and dialogues."""

import json
from dataclasses import replace

import factories
import pytest

from millstream.pipeline.training.datasets import Choice, PairChoice, messages, pairs, preferences, texts, with_contents
from millstream.producers.blob_store import Blobs
from millstream.schemas.errors import CodecError
from millstream.schemas.spans.blobs import LIMIT
from millstream.schemas.wire.records import Triplet

SYSTEM = {"role": "system", "content": "Add."}
USER = {"role": "user", "content": "1 + 2?"}
CALLS = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
ASKS = {"role": "assistant", "content": None, "tool_calls": CALLS}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "3"}


def triplet(rollout, turn, prompt, response, **fields):
    texts_ = {"prompt": json.dumps(prompt), "response": json.dumps(response), "tools": json.dumps(TOOLS)}
    return Triplet(
        **{"rollout_id": rollout, "attempt_id": "a", "group_id": "g", "turn": turn, "span_id": "s"} | texts_ | fields
    )


def said(text):
    return {"role": "assistant", "content": text, "refusal": None}


RIGHT = [triplet("r", 0, [SYSTEM, USER], ASKS), triplet("r", 1, [SYSTEM, USER, ASKS, RESULT], said("3"), reward=1.0)]
WRONG = [triplet("w", 0, [SYSTEM, USER], said("4"), reward=0.0)]


def test_each_answer_is_an_example_that_is_learnt_once():
    first, second = messages([RIGHT, WRONG], Choice(min_reward=0.5))
    assert first == {"messages": [SYSTEM, USER, ASKS], "tools": TOOLS}
    assert second["messages"] == [SYSTEM, USER, ASKS | {"weight": 0}, RESULT, {"role": "assistant", "content": "3"}]
    assert len(list(messages([RIGHT, WRONG]))) == 3


def test_turns_of_a_conversation_are_one_example_with_each_chosen_answer():
    broken = [triplet("b", 0, [USER], said("1"), reward=1.0), triplet("b", 1, [SYSTEM, USER], said("3"), reward=1.0)]
    whole, alone, first, second = messages([RIGHT, WRONG, broken], merge_turns=True)
    assert whole["messages"] == [SYSTEM, USER, ASKS, RESULT, {"role": "assistant", "content": "3"}]
    assert alone["messages"] == [SYSTEM, USER, {"role": "assistant", "content": "4"}]
    assert [first["messages"][0], second["messages"][0]] == [USER, SYSTEM]
    unchosen = [replace(RIGHT[0], reward=0.0), RIGHT[1]]
    (last,) = messages([unchosen], Choice(min_reward=0.5), merge_turns=True)
    assert [message.get("weight") for message in last["messages"]] == [None, None, 0, None, None]


def test_tools_in_the_form_of_the_semantic_conventions_become_openais():
    flat = json.dumps([{"type": "function", "name": "add", "parameters": {}}])
    (example,) = messages([[triplet("r", 0, [USER], said("3"), tools=flat)]])
    assert example["tools"] == TOOLS


def test_what_is_not_trainable_is_in_no_data_set():
    useless = [triplet("r", 0, [USER], said("x"), reward=1.0, trainable=False, reason="empty response")]
    assert list(messages([useless])) == list(preferences([useless, WRONG])) == list(texts([useless])) == []


def test_the_best_and_the_worst_answer_to_a_prompt_make_a_pair():
    middle = [triplet("m", 0, [SYSTEM, USER], said("2"), reward=0.5)]
    (pair,) = preferences([middle, RIGHT, WRONG])
    assert pair == {
        "input": {"messages": [SYSTEM, USER], "tools": TOOLS},
        "preferred_output": [ASKS],
        "non_preferred_output": [{"role": "assistant", "content": "4"}],
    }


def test_other_groups_and_equal_rewards_make_no_pair():
    elsewhere = [triplet("e", 0, [SYSTEM, USER], said("9"), reward=1.0, group_id="h")]
    equal = [triplet("q", 0, [SYSTEM, USER], said("5"), reward=0.0)]
    assert list(preferences([WRONG, elsewhere, equal])) == []


def answers(*rewards: float) -> list[list[Triplet]]:
    return [[triplet(f"r{n}", 0, [USER], said(f"{n}"), reward=reward)] for n, reward in enumerate(rewards)]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (PairChoice(), [(1.0, 0.0)]),
        (PairChoice(every=True), [(1.0, 0.5), (1.0, 0.5), (1.0, 0.0), (0.5, 0.0), (0.5, 0.0)]),
        (PairChoice(margin=0.5, every=True), [(1.0, 0.0)]),
        (PairChoice(margin=1.0), []),
    ],
)
def test_pairs_are_the_best_and_the_worst_or_every_two_above_a_margin(
    choice: PairChoice, expected: list[tuple[float, float]]
):
    assert [(better, worse) for (_, better), (_, worse) in pairs(answers(0.5, 1.0, 0.5, 0.0), choice)] == expected


def test_equal_answers_make_no_pair_whatever_they_earned():
    same = [[triplet(name, 0, [USER], said("3"), reward=reward)] for name, reward in (("a", 1.0), ("b", 0.0))]
    assert list(pairs(same, PairChoice(every=True))) == []


def test_a_rollout_as_a_dialogue():
    (text,) = texts([RIGHT])
    assert text.startswith('## Call 0\nsystem: Add.\nuser: 1 + 2?\nassistant: add({"a": 1})\nreward: 1\n\n## Call 1')


def test_the_semantic_conventions_parts_become_openais_messages():
    prompt = [
        {"role": "user", "parts": [{"type": "text", "content": "1 + 2?"}]},
        {"role": "assistant", "parts": [{"type": "tool_call", "id": "c1", "name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": 3}]},
    ]
    answer = [{"role": "assistant", "parts": [{"type": "text", "content": "3"}], "finish_reason": "stop"}]
    (example,) = messages([[triplet("r", 0, prompt, answer)]])
    assert example["messages"] == [USER, ASKS | {"weight": 0}, RESULT, {"role": "assistant", "content": "3"}]


def test_a_text_without_messages_is_named():
    with pytest.raises(CodecError, match="rollout r, turn 0: its response is not in a known form of messages"):
        list(texts([[triplet("r", 0, [USER], {})]]))


async def test_long_contents_are_in_the_data_set_and_not_in_the_triplet(tmp_path):
    blobs = Blobs(str(tmp_path))
    long = json.dumps([USER | {"content": "x" * LIMIT}])
    span = await blobs.keep(factories.span(factories.task(), "a", attributes={"messages": long}))
    kept = replace(RIGHT[1], prompt=span.attributes["messages"])
    assert len(kept.prompt) < 200
    assert with_contents(kept, blobs) == replace(kept, prompt=long)
