"""Text and JSON that records can hold."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.schemas.spans.text import as_text, json_text, parsed, texts, utf8

HALF = "\ud83d"
SMILE = "\U0001f600"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ""),
        ("plain", "plain"),
        ("grün \0", "grün \0"),
        (HALF, "�"),
        (f"{HALF}a", "�a"),
        ("a\ude00", "a�"),
        ("\ud83d\ude00", SMILE),
        ("\ude00\ud83d", "��"),
        (f"\ufeff{HALF}", "\ufeff�"),
        ("\udcff", "�"),
    ],
)
def test_half_a_character_is_joined_or_replaced(given: str, expected: str) -> None:
    """A1."""
    assert utf8(given) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, '"NaN"'),
        ({"a": math.inf, "b": [-math.inf, (1.5,)]}, '{"a": "Infinity", "b": ["-Infinity", [1.5]]}'),
        ({math.nan: 1}, '{"NaN": 1}'),
        ([{math.nan}, b"\0"], '[["NaN"], "AA=="]'),
        ({"a": 1e308, "b": 1 << 64}, '{"a": 1e+308, "b": 18446744073709551616}'),
        ([HALF, {HALF: HALF}], '["�", {"�": "�"}]'),
        ([math.nan, "\ud83d\ude00"], f'["NaN", "{SMILE}"]'),
    ],
)
def test_what_json_does_not_have_is_written_as_valid_json(value: Any, expected: str) -> None:
    """E13."""
    assert json_text(value) == expected
    json.loads(expected, parse_constant=pytest.fail)


def _nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def _circular() -> Any:
    value: list[Any] = [math.nan]
    value += [value, value]
    return value


class Broken:
    def __str__(self) -> str:
        raise KeyError("its own")

    __repr__ = __str__


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (_nested(300_000), "nested too deeply"),
        ({"a": [_nested(300_000), math.nan]}, "nested too deeply"),
        (_circular(), "refers to itself"),
        ({(1, 2): 3}, "keys must be"),
        (10**5000, "digits"),
        (Broken(), "its own"),
    ],
    ids=["deep", "deep with NaN", "circular", "key", "digits", "broken"],
)
def test_what_is_not_json_is_a_value_error_or_its_repr(value: Any, why: str) -> None:
    """A5: never a RecursionError. Attributes take anything."""
    with pytest.raises(ValueError, match=why):
        json_text(value)
    assert utf8(texts({"a": value, "b": 1})["a"])


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    )
)
def test_json_text_is_read_by_every_parser(value: Any) -> None:
    text = json_text(value)
    assert utf8(text) is text
    again = json.loads(text, parse_constant=pytest.fail)
    assert json_text(again) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'"smile \ud83d"', "smile �"),
        (r'{"\ud83d": ["\ud83d\ude00"]}', {"�": [SMILE]}),
        (r'"\\ud83d"', r"\ud83d"),
        ("18446744073709551616", 1 << 64),
    ],
)
def test_strings_in_json_of_others_are_valid(text: str, value: Any) -> None:
    """A1: pure ASCII that holds half a character once it is parsed."""
    assert parsed(text) == value


@pytest.mark.parametrize(
    "text", ["[" * 300_000, "[" * 300_000 + "]" * 300_000, '{"a":' * 100_000, "{", "", "9" * 5000], ids=range(6)
)
def test_json_of_others_that_cannot_be_read_is_a_value_error(text: str) -> None:
    """A5."""
    with pytest.raises(ValueError, match=r"deeply|Expecting|digits"):
        parsed(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "a"), (math.nan, "NaN"), (-math.inf, "-Infinity"), (1, "1"), (True, "true"), (None, "null"), (HALF, "�")],
)
def test_an_attribute_is_text(value: Any, text: str) -> None:
    assert as_text(value) == text == texts({"a": value})["a"]
