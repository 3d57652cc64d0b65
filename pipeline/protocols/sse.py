"""Server-sent events (WHATWG HTML, section 9.2), as model servers send them: parsed from a stream, and written."""

import re
from typing import Any, Final

from millstream.pipeline.protocols.json_text import dumps

MAX_EVENT: Final = 16 << 20  # bytes
DONE: Final = b"data: [DONE]\n\n"
_EMPTY_LINE: Final = re.compile(rb"(?>\r\n|\n|\r)(?:\r\n|\n|\r)")  # an event's last line break, and the empty line
_BREAK_BYTES: Final = 4  # of it, at most


class EventTooLarge(Exception):
    """An event of a stream exceeds `MAX_EVENT` bytes."""


class Events:
    """Gathers the pieces of a stream and returns its events, each with the empty line that ends it. The events and the
    `rest`, joined, are the stream's own bytes."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # without the end of an event
        self._size = 0
        self._seen = b""  # the last bytes of them

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that this piece completes. Raises `EventTooLarge`."""
        if not self._pieces:
            data = piece
        else:
            seen = self._seen + piece
            self._pieces.append(piece)
            if b"\n\n" not in seen and (b"\r" not in seen or _EMPTY_LINE.search(seen) is None):
                return self._keep(seen, len(piece))
            data = b"".join(self._pieces)
        if b"\r" in data:
            ends = [match.end() for match in _EMPTY_LINE.finditer(data)]
            events = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            rest = data[ends[-1] :] if ends else data
        else:
            *found, rest = data.split(b"\n\n")
            events = [event + b"\n\n" for event in found]
        self._pieces, self._size, self._seen = [rest] if rest else [], len(rest), rest[1 - _BREAK_BYTES :]
        return events or self._keep(self._seen, 0)

    def rest(self) -> bytes:
        """What follows the last event that is complete."""
        rest, self._pieces, self._size = b"".join(self._pieces), [], 0
        return rest

    def _keep(self, seen: bytes, added: int) -> list[bytes]:
        self._seen = seen[1 - _BREAK_BYTES :]
        self._size += added
        if self._size > MAX_EVENT:
            raise EventTooLarge(f"an event of the stream has more than {MAX_EVENT:,} bytes")
        return []


def data_of(event: bytes) -> bytes:
    """Its ``data`` lines, joined; empty if it has none."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:  # nearly all of them
        return event[6:-2]
    lines = [line[5:].removeprefix(b" ") for line in _lines(event) if line.startswith(b"data:")]
    return b"\n".join(lines)


def comments_of(event: bytes) -> list[bytes]:
    return [line[1:].strip() for line in _lines(event) if line.startswith(b":")]


def event(data: Any, name: str = "") -> bytes:
    """``data`` as JSON, under an event's name if it has one."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dumps(data) + b"\n\n"


def _lines(event: bytes) -> list[bytes]:
    """A byte order mark before a stream is no part of its first line."""
    return event.removeprefix(b"\xef\xbb\xbf").splitlines()
