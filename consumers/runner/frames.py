"""What a runner and its agent processes say to each other over a socket: frames of a fixed head and two byte strings.

Encoded records travel as they are: the runner never decodes a span that an agent process has encoded.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """Of a frame; what its ``head`` and ``body`` hold."""

    CONFIG = 1  # → process: its place among those of the runner; `AgentConfig` as JSON
    TASK = 2  # → process: JSON; encoded RolloutTask, then the encoded Control of its resources
    CANCEL = 3  # → process
    STOP = 4  # → process: end in good order
    READY = 5  # ← process: the agent is imported
    REFUSED = 6  # ← process: the agent can't be imported: why, as text
    STARTED = 7  # ← process
    SPAN = 8  # ← process: the span's kind, and the digests of the contents that it refers to; encoded Span
    ENDED = 9  # ← process: JSON outcome
    SPAN_REFUSED = 10  # ← process: a span that can't be encoded: why, as text
    STATE = 11  # ← process: what `save_state` was given
    BLOB = 13  # ← process: a content's digest; the content, before the first span of the attempt that refers to it
    CALLING = 12  # ← process: head "1" when a model is being called, "" when none is any more


class Frame(NamedTuple):
    kind: Kind
    number: int  # of the attempt, given by the runner; 0 where there is none
    head: bytes
    body: bytes


_HEAD = struct.Struct("<BIII")  # kind, number, length of head, length of body
_KINDS = {int(kind): kind for kind in Kind}


def pack(kind: Kind, number: int = 0, head: bytes = b"", body: bytes = b"") -> bytes:
    return _HEAD.pack(kind, number, len(head), len(body)) + head + body


class FrameReader:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with ``data``. Exhaust it before feeding more."""
        buffer = self._buffer
        buffer += data
        start, size = 0, len(buffer)
        while size - start >= _HEAD.size:
            kind, number, head_length, body_length = _HEAD.unpack_from(buffer, start)
            middle = start + _HEAD.size + head_length
            end = middle + body_length
            if end > size:
                break
            head = bytes(buffer[start + _HEAD.size : middle])
            yield Frame(_KINDS[kind], number, head, bytes(buffer[middle:end]))
            start = end
        del buffer[:start]
