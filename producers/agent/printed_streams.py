"""``sys.stdout`` and ``sys.stderr`` of code that runs attempts: what an attempt prints is kept with its rollout.

What code writes past them, to the file descriptors (libraries in C, child processes), is not kept.
"""

import sys
from typing import Any, TextIO

from millstream.producers.agent.attempt import current_attempt
from millstream.producers.log_lines import writes_logs
from millstream.producers.printed import Printed


class PrintedStream:
    """Stands for ``sys.stdout`` or ``sys.stderr``. In a process that writes log lines, an attempt's text becomes
    lines of the log; elsewhere it also goes to the stream below, as all other text does."""

    def __init__(self, below: TextIO, name: str, rest: Printed | None) -> None:
        self.below_printed = below
        self._name = name
        self._rest = rest

    def write(self, text: str) -> int:
        attempt = current_attempt()
        printed = self._rest if attempt is None else attempt.printed
        if printed is not None and isinstance(text, str):
            printed.write(self._name, text)
            if writes_logs():
                return len(text)
        return self.below_printed.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below_printed, name)


def keep_printed(rest: Printed | None = None) -> None:
    """From now on, unless the streams have been replaced since. Cheap: called for each attempt. ``rest`` takes what is
    printed outside of attempts."""
    if not isinstance(sys.stdout, PrintedStream):
        sys.stdout = PrintedStream(sys.stdout, "stdout", rest)
    if not isinstance(sys.stderr, PrintedStream):
        sys.stderr = PrintedStream(sys.stderr, "stderr", rest)
