"""Server-sent events, cut out of a stream wherever its pieces begin and end."""

import pytest

from millstream.pipeline.protocols import model_version, sse

STREAM = b": ping\n\nevent: a\ndata: {}\n\ndata: 1\ndata: 2\n\ndata: [DONE]\n\n"
EVENTS = [b": ping\n\n", b"event: a\ndata: {}\n\n", b"data: 1\ndata: 2\n\n", b"data: [DONE]\n\n"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_are_the_same_wherever_the_stream_is_cut(end):
    stream = STREAM.replace(b"\n", end)
    for cut in range(len(stream) + 1):
        events = sse.Events()
        assert events.feed(stream[:cut]) + events.feed(stream[cut:]) + events.feed(b"\n") == EVENTS, cut
    one_by_one = sse.Events()
    found = [event for at in range(len(stream)) for event in one_by_one.feed(stream[at : at + 1])]
    assert found + one_by_one.feed(b"\n") == EVENTS


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
    (text,) = sse.comments_of(model_version.comment("run.0.3"))
    assert model_version.in_comment(text) == "run.0.3"
    assert model_version.in_comment(b"ping") is None
    assert model_version.of_answer("a", None) == model_version.of_answer("a", "a") == "a"
    assert model_version.of_answer("a", "b") == model_version.MIXED
    assert model_version.of_answer(None, "") is None
