"""Text that records can hold: valid UTF-8, and JSON that every parser reads.

All text of records passes `utf8`, at the latest in `codec.encode`. `json_text` writes the JSON that goes into records;
`parsed` reads JSON that others wrote.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Final

# Control characters but tab and line feed, and those that change the direction of what follows.
CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
MOST_TOKENS: Final = (1 << 32) - 1  # of a call; the store counts no more either
LONGEST: Final = 4000  # characters of a reason or an error
_HALF_ESCAPED: Final = re.compile(r"\\u[dD][89a-fA-F]")  # perhaps half a character


def texts(values: Mapping[str, Any] | None) -> dict[str, str]:
    """Attributes as records hold them: strings as they are, everything else as JSON text. Never raises: what is not
    JSON becomes its ``repr``."""
    if not values:
        return {}
    # The SDK's own mappings are fast to copy, but slow to read.
    plain = values.copy() if hasattr(values, "copy") else dict(values)
    try:
        return {
            key: utf8(value) if type(value) is str else str(value) if type(value) is int else as_text(value)
            for key, value in plain.items()
        }
    except ValueError:
        return {key: _text_or_repr(value) for key, value in plain.items()}


def as_text(value: Any) -> str:
    """A string as it is; anything else as `json_text` has it, which may raise. NaN and infinities become strings."""
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, float) and not math.isfinite(value):
        return _name_of(value)
    return json_text(value)


def utf8(text: str) -> str:
    """Valid UTF-8: joins the two halves of a character, and replaces a half alone by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def valid(value: Any) -> Any:
    """The value, or the record, with valid text in all of it."""
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, Mapping):
        return {valid(key): valid(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple([valid(inner) for inner in value])
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: valid(getattr(value, f.name)) for f in fields(value)})
    return value


def cut(text: str) -> str:
    """Valid text of at most `LONGEST` characters: an error's message may be of any length."""
    text = utf8(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def json_text(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Valid JSON in valid UTF-8. ``default`` converts what JSON doesn't know; without it mappings, sets and bytes (in
    base64) are converted, and other objects by ``str``.

    NaN and infinities, which JSON doesn't have, become the strings "NaN", "Infinity" and "-Infinity", as in ProtoJSON.
    Raises ValueError for a circular reference, a key that is not a string or a number, and too many levels.
    """
    encoder = _ENCODER if default is None else json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=default)
    try:
        try:
            return utf8(encoder.encode(value))
        except ValueError:  # a number that JSON doesn't have, perhaps
            return utf8(encoder.encode(_with_names(value, default or _plain, set())))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # from an object's own code, too
        raise ValueError(str(error)) from error


def parsed(text: str) -> Any:
    """The value of JSON text, whose strings are valid UTF-8. Raises ValueError, also for too many levels."""
    try:
        value = json.loads(text)
        if _HALF_ESCAPED.search(text) is None:
            return value
        return json.loads(utf8(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def harmless(text: str) -> str:
    """The text with control characters, such as those of escape sequences, as Python writes them (``\\x1b``)."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def on_one_line(text: str) -> str:
    """`harmless`, and with its line feeds as ``\\n``."""
    return harmless(text).replace("\n", "\\n")


def safe_repr(value: Any) -> str:
    """Its ``repr``, or its type if that raises."""
    try:
        return utf8(repr(value))
    except Exception:  # nested too deeply, or from an object's own code
        return f"<{type(value).__name__}>"


def _text_or_repr(value: Any) -> str:
    try:
        return as_text(value)
    except ValueError:
        return safe_repr(value)


def _with_names(value: Any, default: Callable[[Any], Any], around: set[int]) -> Any:
    """The value with names instead of NaN and infinities. ``around``: ids of the objects that hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return _name_of(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if id(value) in around:
        raise ValueError("it refers to itself")
    around.add(id(value))
    if isinstance(value, dict):
        found: Any = {
            _with_names(key, default, around) if isinstance(key, float) else key: _with_names(inner, default, around)
            for key, inner in value.items()
        }
    elif isinstance(value, list | tuple):
        found = [_with_names(inner, default, around) for inner in value]
    else:
        found = _with_names(default(value), default, around)
    around.discard(id(value))
    return found


def _name_of(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    if isinstance(value, set | frozenset):
        return list(value)
    return str(value)


# Made once: json.dumps would make an encoder for each value.
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_plain)


def token_count(text: str | None) -> int | None:
    """How many tokens a model's server says that a call took, at most `MOST_TOKENS`; None if it says no number."""
    if not text or not (text.isascii() and text.isdecimal()) or len(text) > 19:
        return None
    return min(int(text), MOST_TOKENS)
