"""JSON that orjson refuses or rounds."""

import json
import math

import pytest

from millstream.pipeline.protocols.json_text import dumps, loads, loads_object

LONG = [2**63 - 1, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 10**30, 123456789012345678901234567890]


@pytest.mark.parametrize("number", LONG)
def test_integers_keep_their_digits(number):
    text = b'{"a": [%d, 0.0001234567890123456789, "x"]}' % number
    assert loads(text)["a"][0] == number
    assert loads(dumps(loads(text))) == loads(text)
    assert str(number).encode() in dumps(loads(text))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "[1, NaN]", '{"a": -Infinity}', "1e400"])
def test_numbers_that_are_no_json_are_read_and_written_as_they_came(text):
    found = dumps(loads(text.encode())).decode()
    assert repr(json.loads(found)) == repr(json.loads(text))
    assert "null" not in found


@pytest.mark.parametrize("text", [r'"a\ud83d"', r'"\ude00b"', r'{"\ud83d": "x"}', r'["😀", "\ud83d"]'])
def test_half_characters_are_read_and_written_as_they_came(text):
    assert json.loads(dumps(loads(text.encode()))) == json.loads(text)


def test_bytes_that_are_no_utf8_are_replaced():
    assert loads(b'"a\xf0\x9f"') == "a\ufffd"
    assert loads(b"\xef\xbb\xbf{}") == {}


@pytest.mark.parametrize("text", [b"", b"{", b"<html>", b"[" * 300_000, b'{"a":' * 300_000])
def test_what_is_not_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"Expecting|nested"):
        loads(text)
    assert loads_object(text) is None


def test_objects_only():
    assert loads_object(b"[]") is None
    assert loads_object(b'{"a": NaN}').keys() == {"a"}
    assert math.isnan(loads(b"NaN"))


def test_digits_behind_a_point_are_no_integer():
    """They are frequent in log-probabilities, and Python's own parser is slow."""
    from millstream.pipeline.protocols import json_text

    assert not json_text._has_long_integer(b"[-0.00012345678901234567, 0.1234567890123456789, 1234567890]")
    assert json_text._has_long_integer(b"[-0.00012345678901234567, 9223372036854775808]")
    assert json_text._has_long_integer(b"9223372036854775808")
