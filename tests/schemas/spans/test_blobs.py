"""Long contents kept apart, whatever they hold."""

import json

import factories
import pytest

from millstream.schemas.spans.blobs import LIMIT, is_reference, kept_apart, whole
from millstream.schemas.spans.text import utf8
from millstream.schemas.wire import codec

LONG = {
    "deep": "[" * 300_000,
    "deep and whole": "[" * 150_000 + "]" * 150_000,
    "objects": '{"a":' * 60_000,
    "deep below Python's limit": "[" * 900 + json.dumps("x" * 300_000) + "]" * 900,
    "half a character": "\ud83d" * 100_000,
    "half a character, escaped": json.dumps(["\ud83d" * 60_000]),
    "not finite": json.dumps([float("nan"), 1e308, "x" * 300_000]),
    "beyond a float": "[1e999, " + json.dumps("x" * 300_000) + "]",
    "digits": "9" * 300_000,
}


@pytest.mark.parametrize("name", LONG)
def test_any_long_text_is_kept_apart_and_comes_back(name: str) -> None:
    """A5: text that looks like deep JSON, or holds half a character, fails no attempt."""
    text = LONG[name]
    span, contents = kept_apart(factories.span(factories.task(), "a", attributes={"a": text}))
    kept = span.attributes["a"]
    assert len(kept) <= LIMIT
    assert contents
    assert codec.encode(span)
    again = whole(kept, contents.__getitem__)
    if is_reference(kept):
        assert again == utf8(text)
    else:
        json.loads(again, parse_constant=pytest.fail)
