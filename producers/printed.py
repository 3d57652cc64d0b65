"""Keeps what an attempt prints with its rollout: in its root span, and as log lines that name it."""

import logging
import threading
import time
from collections import deque
from typing import Final

from opentelemetry.trace import Span

from millstream.producers.log_lines import rollout_fields, writes_logs
from millstream.schemas.spans import semconv

# Of an attempt: the last lines are kept, which hold what went wrong. The log has all.
MAX_LINES: Final = 1000
MAX_CHARACTERS: Final = 64 << 10
MAX_LINE: Final = 8 << 10  # characters; a longer line is continued in another

_loggers = {name: logging.getLogger(f"millstream.{name}") for name in ("stdout", "stderr")}


class Printed:
    """What one attempt has printed. Any thread may call."""

    def __init__(self, rollout_id: str, attempt_id: str) -> None:
        self._fields = rollout_fields(rollout_id, attempt_id)
        self._lines: deque[tuple[int, str, str]] = deque()  # time, stream, text
        self._size = 0
        self._left_out = 0
        self._open = {"stdout": "", "stderr": ""}  # lines that have not ended
        self._lock = threading.Lock()

    def write(self, stream: str, text: str) -> None:
        with self._lock:
            *lines, rest = (self._open[stream] + text).split("\n")
            while len(rest) >= MAX_LINE:
                lines.append(rest[:MAX_LINE])
                rest = rest[MAX_LINE:]
            self._open[stream] = rest
            for line in lines:
                self._keep(stream, line)

    def end(self, span: Span) -> None:
        """Adds the lines to the attempt's root span, as events."""
        with self._lock:
            for stream, rest in self._open.items():
                if rest:
                    self._keep(stream, rest)
                self._open[stream] = ""
            for when, stream, line in self._lines:
                span.add_event(semconv.PRINTED, {semconv.PRINTED_STREAM: stream, semconv.PRINTED_TEXT: line}, when)
            if self._left_out:
                span.set_attribute(semconv.PRINTED_LEFT_OUT, self._left_out)
            self._lines.clear()

    def _keep(self, stream: str, line: str) -> None:
        line = line.removesuffix("\r").rpartition("\r")[2]  # of a progress bar: its last state
        for start in range(0, len(line) or 1, MAX_LINE):
            part = line[start : start + MAX_LINE]
            if writes_logs():
                _loggers[stream].info("%s", part, extra=self._fields)
            self._lines.append((time.time_ns(), stream, part))
            self._size += len(part)
        while len(self._lines) > MAX_LINES or self._size > MAX_CHARACTERS:
            self._size -= len(self._lines.popleft()[2])
            self._left_out += 1
