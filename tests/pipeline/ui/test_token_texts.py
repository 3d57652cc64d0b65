"""Texts of tokens: those that a person can read, and nothing for what this machine can't know."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from millstream.pipeline.ui import text
from millstream.pipeline.ui.token_texts import token_texts

tokenizers = pytest.importorskip("tokenizers", reason="texts of tokens need the extra `train`")


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["The answer is five. é"] * 3, vocab_size=300, special_tokens=["<|end|>"], min_frequency=1)
    made.save(str(tmp_path / "tokenizer.json"))
    digest = hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    return {"arguments": {"learner": {"model": str(tmp_path)}}, "model": {"tokenizer.json": digest}}


def test_each_token_has_its_text(record: dict[str, Any]) -> None:
    of = token_texts(record)
    assert of is not None
    whole = tokenizers.Tokenizer.from_file(f"{record['arguments']['learner']['model']}/tokenizer.json")
    ids = whole.encode("The answer is five.").ids
    assert "".join(map(of, ids)) == "The answer is five."
    assert of(0) == "<|end|>"
    assert of(10**6) == ""
    part = whole.token_to_id("Ã")  # the first byte of é, of which a decoder makes a replacement character
    assert of(part) == "Ã"


@pytest.mark.parametrize("wrong", ["digest", "folder", "file", "no digests", "no model"])
def test_without_the_very_tokenizer_there_are_no_texts(record: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    if wrong == "digest":
        record["model"]["tokenizer.json"] = "0" * 64
    elif wrong == "folder":
        record["arguments"] = {"model": str(tmp_path / "gone")}
    elif wrong == "file":
        (tmp_path / "tokenizer.json").write_text("{")
        record["model"]["tokenizer.json"] = hashlib.sha256(b"{").hexdigest()
    elif wrong == "no digests":
        record["model"] = None
    else:
        record["arguments"] = {}
    assert token_texts(record) is None


def test_what_a_token_does_to_a_line_can_be_seen() -> None:
    assert text.token(" a\n\tb\u202e") == "␣a⏎⇥b\\u202e"
