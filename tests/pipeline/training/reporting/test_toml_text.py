"""What is written as TOML is read as it was."""

import math
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.pipeline.training.reporting.toml_text import toml_text

texts = st.text(st.characters(exclude_categories=["Cs"]))
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts
lists = st.lists(plain.filter(lambda value: value is not None) | st.lists(texts))


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value


@settings(max_examples=50)
@given(st.dictionaries(texts, st.recursive(plain | lists, lambda inner: st.dictionaries(texts, inner))))
def test_values_come_back(values: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(values)) == without_none(values)


def test_tables_in_lists_come_back() -> None:
    values = {"a": [{"b": 1, "c d": [{"e": "\x7f"}]}, {}], "t": {"u": {}}}
    assert tomllib.loads(toml_text(values)) == values


def test_numbers_keep_their_type() -> None:
    found = tomllib.loads(toml_text({"a": 1, "b": 1.0, "c": True, "d": math.nan, "e": 1e-6, "f": 1e22}))
    assert [type(value) for value in found.values()] == [int, float, bool, float, float, float]


def test_what_toml_lacks_is_refused() -> None:
    with pytest.raises(TypeError, match="can't be written as TOML"):
        toml_text({"a": object()})
