"""References that replace long contents of attributes (256 KB and more), such as images.

A reference is text. Where an attribute holds JSON it replaces the long strings in it: messages stay messages, and an
image that each turn repeats is stored once. An attribute that is still too long is replaced as a whole. Contents are
named by their SHA-256. Pure; `producers.blob_store` stores them.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from millstream.schemas.spans.text import json_text, parsed, utf8
from millstream.schemas.wire.records import Span

DEFAULT_URL: Final = "runs/blobs"
LIMIT: Final = 256 << 10  # bytes of an attribute
PART: Final = 32 << 10  # bytes of a string within JSON that is replaced by itself
_REFERENCE: Final = re.compile(r"millstream-blob sha256:([0-9a-f]{64}) \(\d+ bytes\)")


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_reference(text: str) -> bool:
    return _REFERENCE.fullmatch(text) is not None


def kept_apart(span: Span) -> tuple[Span, Mapping[str, bytes]]:
    """The span with references, and their contents by digest; the span itself if nothing is too long."""
    if _short(span.attributes) and all(_short(event.attributes) for event in span.events):
        return span, {}
    contents: dict[str, bytes] = {}
    events = tuple(replace(event, attributes=_apart(event.attributes, contents)) for event in span.events)
    attributes = _apart(span.attributes, contents)
    return (replace(span, attributes=attributes, events=events) if contents else span), contents


def whole(text: str, get: Callable[[str], bytes]) -> str:
    """The text with the contents in place of their references; ``get`` finds one by its digest."""
    if (found := _REFERENCE.fullmatch(text)) is not None:
        text = get(found[1]).decode()
    if _REFERENCE.search(text) is None:
        return text

    def part(inner: str) -> str:
        found = _REFERENCE.fullmatch(inner)
        return inner if found is None else get(found[1]).decode()

    return _with_strings(text, part) or text  # or text that mentions a reference


def _apart(attributes: Mapping[str, str], contents: dict[str, bytes]) -> Mapping[str, str]:
    def refer(text: str) -> str:
        content = utf8(text).encode()
        digest = digest_of(content)
        contents[digest] = content
        return f"millstream-blob sha256:{digest} ({len(content)} bytes)"

    def shortened(value: str) -> str:
        shorter = _with_strings(value, lambda text: text if _fits(text, PART) else refer(text)) or value
        return shorter if _fits(shorter, LIMIT) else refer(shorter)

    return {name: value if _fits(value, LIMIT) else shortened(value) for name, value in attributes.items()}


def _short(attributes: Mapping[str, str]) -> bool:
    """Whether nothing is too long, without encoding: a character has at most four bytes."""
    return max(map(len, attributes.values()), default=0) <= LIMIT // 4


def _fits(text: str, limit: int) -> bool:
    return len(text) <= limit // 4 or len(utf8(text).encode()) <= limit


def _with_strings(text: str, change: Callable[[str], str]) -> str | None:
    """JSON text with its strings changed. None if it is not JSON, or has too many levels."""
    try:
        return json_text(_mapped(parsed(text), change))
    except (ValueError, RecursionError):
        return None


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(inner, change) for inner in value]
    if isinstance(value, dict):
        return {name: _mapped(inner, change) for name, inner in value.items()}
    return value
