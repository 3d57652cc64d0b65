"""Turns that go on from each other: what is written once, and what makes one sequence."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.schemas.ids import new_id
from millstream.schemas.wire import codec
from millstream.schemas.wire.prefixes import common, conversations, expand, links, share
from millstream.schemas.wire.records import Triplet

ROLLOUT = new_id()


def tokens(values) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def turn(number, prompt, response=(), text="", **fields) -> Triplet:
    made = {"prompt_token_ids": tokens(prompt), "response_token_ids": tokens(response)} | fields
    made["response_logprobs"] = bytes(len(made["response_token_ids"] or b""))
    return Triplet(
        rollout_id=ROLLOUT, attempt_id="a", group_id="g", turn=number, span_id="s", prompt=text, response="{}", **made
    )


SYSTEM = list(range(100, 130))


def test_a_conversation_is_written_once_and_read_whole():
    text = '[{"role": "system", "content": "é' + "x" * 80 + '"}'
    turns = [
        turn(0, [*SYSTEM, 1], [2], text + "]", tools='[{"name": "add"}]'),
        turn(1, [*SYSTEM, 1, 2, 3], [4, 5], text + ', {"a": 1}]', tools='[{"name": "add"}]'),
        turn(2, [*SYSTEM, 1, 2, 3, 4, 5, 6], [7], text + ', {"a": 1}, {"b": 2}]'),
    ]
    first, second, third = share(turns)
    assert first == turns[0]
    assert (second.prefix_turn, second.prompt_token_ids, second.prompt) == (0, tokens([3]), ', {"a": 1}]')
    assert (third.prefix_turn, third.prompt_token_ids, third.prompt) == (1, tokens([6]), ', {"b": 2}]')
    assert expand([third, first, second]) == turns
    assert [[t.turn for t in run] for run in conversations(turns)] == [[0, 1, 2]]


def test_bytes_of_a_conversation_grow_linearly():
    def size(turns: int) -> int:
        made, prompt, text = [], [*SYSTEM], "[" + "s" * 100
        for number in range(turns):
            made.append(turn(number, prompt, [number] * 20, text + "]"))
            prompt = [*prompt, *[number] * 20, *[7] * 10]
            text += ', {"role": "user", "content": "' + "w" * 60 + '"}'
        return sum(len(codec.encode(triplet)) for triplet in share(made))

    assert size(200) < 11 * size(20)


def test_interleaved_conversations_are_told_apart():
    planner, worker = [*SYSTEM, 1], [*SYSTEM, 2]
    turns = [
        turn(0, planner, [10]),
        turn(1, worker, [20]),
        turn(2, [*planner, 10, 11], [12]),
        turn(3, [*worker, 20, 21], [22]),
    ]
    assert [[t.turn for t in run] for run in conversations(turns)] == [[0, 2], [1, 3]]
    assert expand(share(turns)) == turns


def test_a_response_that_comes_back_in_other_tokens_breaks_the_sequence():
    """As when the template drops the thinking of earlier turns, and opens each answer with it."""
    turns = [turn(0, [*SYSTEM, 1, 50], [51, 52, 2]), turn(1, [*SYSTEM, 1, 2, 3, 50], [4])]
    assert [(link.whole, link.broken, link.tokens) for link in links(turns) if link] == [(False, True, 31)]
    assert [[t.turn for t in run] for run in conversations(turns)] == [[0], [1]]
    assert expand(share(turns)) == turns


def test_a_shared_system_prompt_is_no_conversation():
    turns = [turn(0, [*SYSTEM, *[1] * 20], [2]), turn(1, [*SYSTEM, *[3] * 30], [2])]
    assert [(link.whole, link.broken) for link in links(turns) if link] == [(False, False)]


def test_a_reference_to_a_turn_that_is_missing_is_named():
    shared = share([turn(0, [*SYSTEM], [1]), turn(1, [*SYSTEM, 1, 2], [3])])
    with pytest.raises(ValueError, match=f"{ROLLOUT}, turn 1: it continues turn 0, which is missing"):
        expand(shared[1:])


def test_turn_numbers_that_repeat_are_written_whole():
    turns = [turn(0, [*SYSTEM], [1]), turn(0, [*SYSTEM, 1, 2], [3])]
    assert share(turns) == turns


few = st.lists(st.integers(0, 2), max_size=4)
piece = st.tuples(st.sampled_from(["on", "from", "new", "text"]), st.integers(0, 5), few, few)


@given(st.lists(piece, max_size=12))
def test_whatever_was_shared_expands_to_what_it_was(pieces):
    turns: list[Triplet] = []
    for number, (how, at, new, response) in enumerate(pieces):
        earlier = turns[at % len(turns)] if turns else None
        prompt, text = tokens([*SYSTEM, *new]), "é" * 70 + str(new)
        if earlier is not None and how == "on":
            prompt = (earlier.prompt_token_ids or b"") + (earlier.response_token_ids or b"") + tokens(new)
            text = earlier.prompt + str(new)
        elif earlier is not None and how == "from":
            prompt, text = (earlier.prompt_token_ids or b"")[:-4] + tokens(new), earlier.prompt[:-1] + str(new)
        ids = {"prompt_token_ids": None, "response_token_ids": None} if how == "text" else {"prompt_token_ids": prompt}
        turns.append(turn(number, [], response, text, **ids))
    assert expand([codec.decode(codec.encode(t)) for t in share(turns)]) == turns
    assert sorted(t.turn for run in conversations(turns) for t in run) == [t.turn for t in turns]


@given(st.binary(max_size=40), st.binary(max_size=10), st.binary(max_size=10))
def test_common_is_the_longest_common_start(start, one, other):
    size = common(start + one, start + other)
    expected = next((i for i, (a, b) in enumerate(zip(start + one, start + other, strict=False)) if a != b), None)
    assert size == (min(len(start + one), len(start + other)) if expected is None else expected)
