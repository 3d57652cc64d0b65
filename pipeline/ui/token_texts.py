"""Texts of tokens, by the tokenizer of the model that a run was started with, if this machine has it."""

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from millstream.pipeline.training.reporting.record import model_folder

FILE: Final = "tokenizer.json"
LARGEST: Final = 64 << 20  # bytes of the file; the largest vocabularies take 30 MB
SPLIT: Final = "\ufffd"  # what a decoder writes for a part of a character


def token_texts(record: Mapping[str, Any]) -> Callable[[int], str] | None:
    """The text of a token by its id, of the run with this record; empty for an id that the vocabulary lacks. None if
    the model's folder has no tokenizer here, or not the one that the run was started with."""
    folder, digests = model_folder(record), record.get("model")
    digest = digests.get(FILE) if isinstance(digests, dict) else None
    if folder is None or not isinstance(digest, str):
        return None
    return _opened(folder / FILE, digest)


@lru_cache(maxsize=4)
def _opened(path: Path, digest: str) -> Callable[[int], str] | None:
    try:
        from tokenizers import Tokenizer  # of the extra `train`

        if path.stat().st_size > LARGEST:
            return None
        held = path.read_bytes()
        if hashlib.sha256(held).hexdigest() != digest:
            return None
        tokenizer = Tokenizer.from_str(held.decode())
    except Exception:  # tokenizers raises nothing more specific for a file that it can't read
        return None

    def text(number: int) -> str:
        name: str = tokenizer.id_to_token(number) or ""
        whole: str = tokenizer.decode([number], skip_special_tokens=False) if name else ""
        return name if SPLIT in whole else whole or name

    return text
