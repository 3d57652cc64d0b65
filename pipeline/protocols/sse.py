"""Server-sent events (WHATWG HTML, section 9.2), as model servers send them: parsed from a stream, and written."""

from typing import Any, Final

import orjson

MAX_EVENT: Final = 16 << 20  # bytes
DONE: Final = b"data: [DONE]\n\n"


class EventTooLarge(Exception):
    """An event of a stream exceeds `MAX_EVENT` bytes."""


class Events:
    """Gathers the pieces of a stream and returns its events, each with the empty line that ends it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that this piece completes. Raises `EventTooLarge`."""
        data = self._rest + piece
        if b"\r" in data:
            held = data.endswith(b"\r")  # perhaps half of a line break
            data = data[: len(data) - held].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\r" * held
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > MAX_EVENT:
            raise EventTooLarge(f"an event of the stream has more than {MAX_EVENT:,} bytes")
        return [event + b"\n\n" for event in events if event]


def data_of(event: bytes) -> bytes:
    """Its ``data`` lines, joined; empty if it has none."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:  # nearly all of them
        return event[6:-2]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def comments_of(event: bytes) -> list[bytes]:
    return [line[1:].strip() for line in event.split(b"\n") if line.startswith(b":")]


def event(data: Any, name: str = "") -> bytes:
    """``data`` as JSON, under an event's name if it has one."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"
