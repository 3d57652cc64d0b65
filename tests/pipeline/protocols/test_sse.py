"""Server-sent events, cut out of a stream wherever its pieces begin and end."""

import time

import pytest

from millstream.pipeline.protocols import model_version, sse

STREAM = b": ping\n\nevent: a\ndata: {}\n\ndata: 1\ndata: 2\n\ndata: [DONE]\n\n"
EVENTS = [b": ping\n\n", b"event: a\ndata: {}\n\n", b"data: 1\ndata: 2\n\n", b"data: [DONE]\n\n"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_are_the_same_wherever_the_stream_is_cut(end):
    """With the stream's own bytes."""
    stream, expected = STREAM.replace(b"\n", end), [event.replace(b"\n", end) for event in EVENTS]
    one_by_one = [stream[at : at + 1] for at in range(len(stream))]
    for pieces in [one_by_one, *([stream[:cut], stream[cut:]] for cut in range(len(stream) + 1))]:
        events = sse.Events()
        found = [event for piece in pieces for event in events.feed(piece)]
        assert b"".join(found) + events.rest() == stream
        assert list(map(sse.data_of, found)) == list(map(sse.data_of, expected)), pieces
        assert list(map(sse.comments_of, found)) == list(map(sse.comments_of, expected))


def test_a_mark_before_a_stream_and_an_end_without_an_empty_line_are_no_part_of_its_events():
    events = sse.Events()
    (first,) = events.feed(b"\xef\xbb\xbfdata: {}\n\ndata: [DONE]\n")
    assert sse.data_of(first) == b"{}"
    assert sse.data_of(events.rest()) == b"[DONE]"
    assert events.rest() == b""


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_large_event_in_small_pieces_takes_linear_time(end):
    """Quadratic parsing would copy 8 GB."""
    events, piece = sse.Events(), b"x" * 1024
    started = time.process_time()
    assert events.feed(b"data: x" + end) == []
    for _ in range(4096):
        assert events.feed(piece) == []
    (event,) = events.feed(end + end)
    assert len(event) == len(b"data: x") + 3 * len(end) + 4096 * 1024
    assert time.process_time() - started < 2.0


def test_the_parts_of_an_event():
    assert sse.data_of(b"data: {}\n\n") == b"{}"
    assert sse.data_of(b"event: a\ndata:1\ndata: 2\n\n") == b"1\n2"
    assert sse.data_of(b": ping\n\n") == b""
    assert sse.comments_of(b": ping\ndata: 1\n:pong\n\n") == [b"ping", b"pong"]
    assert sse.event({"a": 1}, "name") == b'event: name\ndata: {"a":1}\n\n'


def test_an_event_without_an_end_is_too_large_at_some_point():
    events = sse.Events()
    events.feed(b"data: " + b"x" * (sse.MAX_EVENT - 6))
    with pytest.raises(sse.EventTooLarge, match="16,777,216"):
        events.feed(b"x")


def test_versions_travel_in_comments():
    (text,) = sse.comments_of(model_version.comment("run.0.3", ((0, "run.0.3"),)))
    assert model_version.in_comment(text) == ("x-model-version", "run.0.3")
    several = sse.Events().feed(model_version.comment("b", ((0, "a"), (2, "b"))))
    assert [model_version.in_comment(text) for event in several for text in sse.comments_of(event)] == [
        ("x-model-versions", '[[0,"a"],[2,"b"]]'),
        ("x-model-version", "b"),
    ]
    assert model_version.in_comment(b"ping") is None
    assert model_version.of_answer("a", None) == model_version.of_answer("a", "a") == "a"
    assert model_version.of_answer("a", "b") == model_version.MIXED
    assert model_version.of_answer(None, "") is None
    assert model_version.of_tokens(()) is None
    assert model_version.of_tokens(((0, "a"),)) == "a"
    assert model_version.of_tokens(((0, "a"), (1, "b"))) == model_version.MIXED
