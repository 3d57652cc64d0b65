"""Attribute values as the text that records hold: valid UTF-8; JSON for everything that is not a string."""

import base64
import json
from collections.abc import Mapping
from typing import Any


def texts(values: Mapping[str, Any] | None) -> dict[str, str]:
    """Attributes as records hold them: strings as they are, everything else as JSON text."""
    if not values:
        return {}
    # The SDK's own mappings are fast to copy, but slow to read.
    plain = values.copy() if hasattr(values, "copy") else dict(values)
    return {
        key: utf8(value) if type(value) is str else str(value) if type(value) is int else utf8(_json(value))
        for key, value in plain.items()
    }


def as_text(value: Any) -> str:
    """A string as it is; anything else as JSON text (bytes in base64; objects that JSON does not know by ``str``)."""
    return utf8(value if isinstance(value, str) else str(value) if type(value) is int else _json(value))


def utf8(text: str) -> str:
    """Replaces lone surrogates (half a character, which a model may write): no record can hold them."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    if isinstance(value, set | frozenset):
        return list(value)
    return str(value)


_json = json.JSONEncoder(ensure_ascii=False, default=_plain).encode  # json.dumps would make an encoder for each value
