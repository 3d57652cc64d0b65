"""JSON as model servers and their clients write it.

orjson is fast, but it rounds integers beyond 64 bits and refuses NaN, infinities and half characters. What it can't
keep is read and written by Python's own module, so that a value keeps its digits.
"""

import json
import math
from typing import Any, Final

import orjson

_ANY_DIGIT: Final = bytes.maketrans(b"123456789", b"000000000")
_LONG: Final = b"0" * 19  # digits of the first integer beyond 64 bits, -2**63 - 1


class _Constant(float):
    """NaN or an infinity. orjson would write it as null; it refuses a subclass, which makes `dumps` keep it."""


def loads(text: bytes) -> Any:
    """Integers are exact; NaN and infinities are floats; half a character is a lone surrogate, and bytes that are not
    UTF-8 become U+FFFD. Raises `ValueError` if it is not JSON, or nested too deeply."""
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _slowly(text)
    if not _has_long_integer(text):
        return found
    try:
        return _slowly(text)
    except ValueError:  # Python refuses integers of more than 4,300 digits
        return found


def dumps(value: Any) -> bytes:
    """What `loads` has read is written as it came, numbers and half characters included."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, separators=(",", ":")).encode()


def loads_object(text: bytes) -> dict[str, Any] | None:
    """None if it is anything but a JSON object."""
    try:
        found = loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _slowly(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig", "replace"), parse_constant=_Constant, parse_float=_float)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _float(text: str) -> float:
    found = float(text)
    return found if math.isfinite(found) else _Constant(found)


def _has_long_integer(text: bytes) -> bool:
    """Whether `_LONG` digits stand in a row, other than behind a decimal point. True as well for a fraction of twice as
    many digits."""
    return _LONG in text.translate(_ANY_DIGIT).replace(b"." + _LONG, b".")
