"""Tool calls and blocks from the pieces of a stream, in every order and numbering that servers use."""

import itertools
import json
import tracemalloc

import pytest

from millstream.pipeline.protocols.answers import ChatReader
from millstream.pipeline.protocols.pieces import Blocks, ToolCalls

CALLS = [("call_a", "f", '{"x": 1}'), ("call_b", "g", '{"y": 2}')]


def pieces(n, index, *, ids=True, repeat=False):
    """A call in three pieces. ``index``: what each says of it; ``...``: nothing."""
    call_id, name, arguments = CALLS[n]
    number = {} if index is ... else {"index": index}
    identity = {"id": call_id} if ids else {}
    first = {**number, **identity, "type": "function", "function": {"name": name, "arguments": arguments[:3]}}
    rest = [{**number, **(identity if repeat else {}), "function": {"arguments": arguments[3:]}}]
    return [first, *rest]


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("numbers", [(0, 1), (5, 3), (0, 0), (None, None), (..., ...), (0, 1_000_000), (None, 1)])
def test_a_new_id_opens_a_new_call(numbers, repeat):
    """Entry E4: two calls were recorded as one, or the call failed."""
    calls = ToolCalls()
    for n, index in enumerate(numbers):
        for piece in pieces(n, index, repeat=repeat):
            calls.add(piece)
    assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in calls.all] == CALLS


@pytest.mark.parametrize("numbers", [(0, 1), (7, 2)])
@pytest.mark.parametrize("repeat", [False, True])
def test_interleaved_pieces_go_to_their_call(numbers, repeat):
    calls = ToolCalls()
    both = [pieces(n, index, repeat=repeat) for n, index in enumerate(numbers)]
    for piece in itertools.chain.from_iterable(zip(*both, strict=True)):
        calls.add(piece)
    assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in calls.all] == CALLS


@pytest.mark.parametrize("index", [0, None, ...])
def test_pieces_with_ids_and_one_number_for_all_go_to_their_call(index):
    calls = ToolCalls()
    both = [pieces(n, index, repeat=True) for n in (0, 1)]
    for piece in itertools.chain.from_iterable(zip(*both, strict=True)):
        calls.add(piece)
    assert [c["function"]["arguments"] for c in calls.all] == [arguments for *_, arguments in CALLS]


@pytest.mark.parametrize("call_id", ["", None, ...])
@pytest.mark.parametrize("index", [0, None, ...])
def test_whole_calls_without_ids_are_told_apart_by_their_names(index, call_id):
    calls = ToolCalls()
    for _, name, arguments in CALLS:
        piece = {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}
        calls.add({key: value for key, value in piece.items() if value is not ...})
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in calls.all] == [call[1:] for call in CALLS]


def test_a_large_index_costs_no_memory():
    """Entry E12: 376 MiB."""
    tracemalloc.start()
    reader = ChatReader()
    for index in (1_000_000, 10**12, -1):
        reader.event({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": index, "id": str(index)}]}}]})
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert [call["id"] for call in reader.answer.message["tool_calls"]] == ["1000000", str(10**12), "-1"]


@pytest.mark.parametrize("index", ["zero", 1.5, True])
def test_an_odd_index_is_an_index(index):
    calls = ToolCalls()
    for piece in pieces(0, index):
        calls.add(piece)
    assert [c["function"]["arguments"] for c in calls.all] == ['{"x": 1}']


def test_arguments_as_an_object_and_unknown_fields_are_kept():
    calls = ToolCalls()
    signed = {"extra_content": {"google": {"thought_signature": "c2ln"}}}
    calls.add({"id": "a", "function": {"name": "f", "arguments": {"x": 1}}, **signed})
    calls.add({"id": "b", "type": "custom", "custom": {"name": "code", "input": "pri"}})
    calls.add({"custom": {"input": "nt()"}})
    first, second = calls.all
    assert (json.loads(first["function"]["arguments"]), first["extra_content"]) == ({"x": 1}, signed["extra_content"])
    assert second["custom"] == {"name": "code", "input": "print()"}


def written(*deltas):
    """What a protocol that has one block open at a time writes: kind, and the text of each block."""
    blocks, found, now = Blocks(), [], []
    for delta in [*deltas, None]:
        ready = blocks.rest() if delta is None else blocks.add(delta)
        for block, piece in ready:
            if not found or found[-1][0] is not block:
                assert all(block is not other for other, _, _ in found), "a block is opened twice"
                found.append([block, block.kind, ""])
            found[-1][2] += piece
        now.append(len(found))
    return [(block.call["id"] if block.call else kind, text) for block, kind, text in found], now


def test_blocks_follow_one_another_however_their_pieces_come():
    """Entry E6: 0, 1, 0, 1 reached an Anthropic client as six blocks, four of them without id and name."""
    both = [pieces(0, 0), pieces(1, 1)]
    interleaved = [{"tool_calls": [piece]} for pair in zip(*both, strict=True) for piece in pair]
    found, now = written({"reasoning": "hm"}, {"content": "a"}, *interleaved, {"content": "b"})
    assert found == [("thinking", "hm"), ("text", "a"), ("call_a", '{"x": 1}'), ("call_b", '{"y": 2}'), ("text", "b")]
    assert now == [1, 2, 3, 3, 4, 4, 5, 5]  # the second call begins when the first is complete


def test_a_call_opens_when_its_name_is_known():
    late = [{"index": 0, "id": "call_a"}, {"index": 0, "function": {"name": "f", "arguments": "{}"}}]
    found, now = written(*({"tool_calls": [piece]} for piece in late))
    assert (found, now) == ([("call_a", "{}")], [0, 1, 1])


def test_a_call_without_arguments_and_one_that_is_never_complete_are_written_at_the_end():
    found, _ = written(
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f"}}]},
        {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": '{"x'}}]},
        {"content": "text"},
    )
    assert found == [("a", ""), ("b", '{"x'), ("text", "text")]


def test_a_message_from_pieces_keeps_all_of_its_fields():
    reader = ChatReader()
    details = [{"type": "reasoning.text", "text": "h"}]
    for delta in (
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "audio": {"id": "x", "data": "AA"}},
        {"role": "assistant", "content": "b", "reasoning_details": details, "audio": {"id": "x", "data": "BB"}},
        {"content": [{"type": "image", "url": "u"}], "reasoning_details": details, "function_call": {"name": "f"}},
        {"content": None, "function_call": {"arguments": "{"}, "refusal": None},
        {"function_call": {"arguments": "}"}},
    ):
        reader.event({"choices": [{"index": None, "delta": delta, "finish_reason": None}]})
    assert reader.answer.message == {
        "role": "assistant",
        "content": "ab",
        "audio": {"id": "x", "data": "AABB"},
        "reasoning_details": details * 2,
        "parts": [{"type": "image", "url": "u"}],
        "function_call": {"name": "f", "arguments": "{}"},
    }
