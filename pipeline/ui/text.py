"""Texts of records as a page shows them: cut to a bounded length, with controls that can be seen. Pure."""

import re
from datetime import UTC, datetime
from typing import Any, Final

from millstream.schemas.spans.text import json_text, utf8

LONGEST: Final = 20_000  # characters of one text; a browser lays out megabytes of them for seconds
# Control characters but tab and line feed, invisible ones, and those that change the direction of what follows.
CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")

UNITS: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def shown(value: Any, limit: int = LONGEST) -> str:
    """Text that displays in the order in which it was written, and changes nothing around it: controls are written as
    Python does (``\\x1b``). What is longer than ``limit`` is cut, and says how much is missing."""
    text = value if isinstance(value, str) else "" if value is None else json_text(value, str)
    rest = len(text) - limit
    if rest > 0:
        text = text[:limit]
    text = CONTROLS.sub(lambda found: ascii(found[0])[1:-1], utf8(text))
    return f"{text}\n… {rest:,} more characters" if rest > 0 else text


def line(value: Any, limit: int = 160) -> str:
    """`shown`, in one line."""
    text = value if isinstance(value, str) else "" if value is None else json_text(value, str)
    text = " ".join(text[: 2 * limit].split()) + ("…" if len(text) > 2 * limit else "")
    return shown(text if len(text) <= limit else f"{text[: limit - 1]}…")


def token(text: str) -> str:
    """The text of one token, with line feeds and spaces that can be seen."""
    return shown(text, 80).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def number(value: float | None) -> str:
    """Four significant digits, with thousands separated; an en dash for None and NaN."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def seconds(value: float | None) -> str:
    """A duration in its natural unit."""
    if value is None or value != value:
        return "–"
    for size, unit in UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return "0 s"


def moment(ns: int | None) -> str:
    """A time since the epoch, in UTC."""
    if ns is None:
        return "–"
    try:
        return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(ns)


def short_id(value: str | None) -> str:
    """The end of an id: UUIDv7 begin alike."""
    text = line(value or "", 60)
    return text if len(text) <= 12 else f"…{text[-10:]}"
