"""The protocol between a runner and its agent processes, over a socket: frames of a fixed head and two byte strings.

Encoded records travel as they are: the runner does not decode the spans that agent processes encode.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from millstream.schemas.errors import MillstreamError


class Kind(IntEnum):
    """Of a frame. Each comment names the frame's direction, then what its ``head`` and ``body`` hold."""

    CONFIG = 1  # → process: its metrics file; `AgentConfig` as JSON
    TASK = 2  # → process: JSON; encoded RolloutTask, then the encoded Control of its resources
    CANCEL = 3  # → process
    STOP = 4  # → process: end gracefully
    READY = 5  # ← process: the agent is imported
    REFUSED = 6  # ← process: the agent can't be imported; the reason, as text
    STARTED = 7  # ← process
    SPAN = 8  # ← process: the span's kind, and the digests of its contents; encoded Span
    ENDED = 9  # ← process: JSON outcome
    SPAN_REFUSED = 10  # ← process: a span that can't be encoded; the reason, as text
    STATE = 11  # ← process: the argument of `save_state`
    BLOB = 13  # ← process: a content's digest; the content. Comes before the attempt's first span that refers to it
    CALLING = 12  # ← process: head "1" when a model call begins, "" when the last one has ended


class Frame(NamedTuple):
    kind: Kind
    number: int  # of the attempt, assigned by the runner; 0 if there is none
    head: bytes
    body: bytes


# Of a frame's head or body. An agent's attributes, contents and state have limits below it (`emit`, `state`).
MAX_BYTES: Final = 160 << 20


class BadFrame(MillstreamError):
    """The other side does not keep to the protocol."""


_HEAD = struct.Struct("<BIII")  # kind, number, length of head, length of body
_KINDS = {int(kind): kind for kind in Kind}


def pack(kind: Kind, number: int = 0, head: bytes = b"", body: bytes = b"") -> bytes:
    return _HEAD.pack(kind, number, len(head), len(body)) + head + body


class FrameReader:
    """Splits a byte stream into frames. Raises `BadFrame` for one that is too large, or of an unknown kind."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yields the frames that ``data`` completes. Exhaust it before the next call."""
        buffer = self._buffer
        buffer += data
        start, size = 0, len(buffer)
        while size - start >= _HEAD.size:
            kind, number, head_length, body_length = _HEAD.unpack_from(buffer, start)
            if kind not in _KINDS or max(head_length, body_length) > MAX_BYTES:
                raise BadFrame(f"a frame of kind {kind} with {head_length:,} + {body_length:,} bytes, of {MAX_BYTES:,}")
            middle = start + _HEAD.size + head_length
            end = middle + body_length
            if end > size:
                break
            head = bytes(buffer[start + _HEAD.size : middle])
            yield Frame(_KINDS[kind], number, head, bytes(buffer[middle:end]))
            start = end
        del buffer[:start]
