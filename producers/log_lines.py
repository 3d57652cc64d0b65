"""Log lines: one for each event, as text or as JSON, on stderr. The rollout and the attempt are fields of their own.

Code passes them as ``extra=rollout_fields(…)``; within an agent's process they are those of the running attempt. The
stack of an error follows its line in text, indented; in JSON it is a field.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TextIO

from millstream.schemas.spans.text import json_text, on_one_line

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Fields = Mapping[str, str]

FIELDS: Final = ("rollout", "attempt")  # attributes of a `logging.LogRecord`, if they are known
# Libraries that log each of their tries, requests or connections.
NOISY: Final = ("aiokafka", "httpx", "httpx2", "faststream", "urllib3.connectionpool", "clickhouse_connect", "asyncio")
_PACKAGE: Final = "millstream."

_ours: logging.Handler | None = None


def write_logs(
    level: LogLevel = "info",
    form: LogFormat = "text",
    role: str = "",
    logger: logging.Logger | None = None,
    here: Callable[[], Fields] = dict,
    stream: TextIO | None = None,
) -> None:
    """Writes what ``logger`` gets (by default all of the process) to ``stream``, by default what is `sys.stderr` then.
    ``here``: fields of the code that logs, unless the event has them. Another call replaces the first."""
    global _ours
    logger = logger or logging.getLogger()
    if _ours is not None:
        logger.removeHandler(_ours)
    _ours = _ToStderr() if stream is None else logging.StreamHandler(stream)
    _ours.setFormatter((JsonLines if form == "json" else TextLines)(role, here))
    logger.addHandler(_ours)
    logger.setLevel(level.upper())
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def writes_json() -> bool:
    """Whether those lines are JSON: then whatever else is said on stderr has to be, too."""
    return _ours is not None and isinstance(_ours.formatter, JsonLines)


def writes_logs() -> bool:
    """Whether this process writes log lines: a command or an agent's process, not a user's own program."""
    return _ours is not None


def rollout_fields(rollout_id: str, attempt_id: str = "") -> dict[str, str]:
    """``extra`` of an event that concerns a rollout."""
    return {name: value for name, value in zip(FIELDS, (rollout_id, attempt_id), strict=True) if value}


class _ToStderr(logging.Handler):
    """A live view replaces `sys.stderr` for a while, so that lines appear above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = getattr(sys.stderr, "below_printed", sys.stderr)  # not an attempt's own output
            stream.write(f"{self.format(record)}\n")
            stream.flush()
        except Exception:
            self.handleError(record)


class _Lines(logging.Formatter):
    def __init__(self, role: str, here: Callable[[], Fields]) -> None:
        super().__init__()
        self._role = role
        self._here = here

    def fields(self, record: logging.LogRecord) -> dict[str, str]:
        """Those that are known of `FIELDS`."""
        given = {name: str(value) for name in FIELDS if (value := getattr(record, name, ""))}
        return given or dict(self._here())

    def stack(self, record: logging.LogRecord) -> str:
        stacks = [self.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
        return "\n".join([*stacks, *([record.stack_info] if record.stack_info else [])])

    @staticmethod
    def time(record: logging.LogRecord) -> str:
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{whole}.{int(record.created * 1000) % 1000:03d}Z"


class TextLines(_Lines):
    """``TIME LEVEL ROLE LOGGER: message rollout=… attempt=…``. Control characters are escaped, and fields left
    out that the message names."""

    def format(self, record: logging.LogRecord) -> str:
        where = " ".join(filter(None, (self._role, record.name.removeprefix(_PACKAGE))))
        message = on_one_line(record.getMessage())
        given = {name: on_one_line(value) for name, value in self.fields(record).items()}
        fields = "".join(f" {name}={value}" for name, value in given.items() if value not in message)
        line = f"{self.time(record)} {record.levelname:<7} {where}: {message}{fields}"
        stack = self.stack(record)
        return "\n".join([line, *(f"    {on_one_line(each)}" for each in stack.splitlines())])


class JsonLines(_Lines):
    """An object with ``time``, ``level``, ``role``, ``logger``, ``message``, and ``rollout``, ``attempt``, ``stack``
    where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {"time": self.time(record), "level": record.levelname.lower()}
        if self._role:
            event["role"] = self._role
        event |= {"logger": record.name, "message": record.getMessage(), **self.fields(record)}
        if stack := self.stack(record):
            event["stack"] = stack
        return json_text(event, str)
