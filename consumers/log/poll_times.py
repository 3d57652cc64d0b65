"""When consumers polled, and what they read, so that a role can be watched without wrapping its consumers."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from millstream.schemas.errors import Denied, Fenced, LogError

# A permission that is replaced is away for seconds; a role that can't read for longer should end and say so.
REFUSED_S: Final = 60.0


@dataclass(slots=True, eq=False)
class PollTimes:
    """Of one consumer, in seconds of ``time.monotonic``. Any thread may read them; a poll runs within ``with``."""

    opened: float = field(default_factory=time.monotonic)
    last_poll: float | None = None  # when the last poll returned or found the log unavailable; None before the first
    polling_since: float | None = None  # when the current poll began; None between polls
    closed: bool = False
    unread: int = 0  # records that retention had deleted before this consumer read them
    read_bytes: int = 0  # of values

    def __enter__(self) -> None:
        self.polling_since = time.monotonic()

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if not isinstance(error, LogError) or error.retriable:
            self.last_poll = time.monotonic()
        self.polling_since = None

    def forgives(self, error: LogError) -> bool:
        """Whether to retry a call that the log refused with this error: the log is unavailable, or refuses what it
        allowed within the last minute, as when a permission is replaced. A right that is missing from the start is
        waited for as long: a process that ends at once would be started again and again."""
        if error.retriable:
            return True
        since = self.opened if self.last_poll is None and isinstance(error, Denied) else self.last_poll
        return since is not None and time.monotonic() - since < REFUSED_S and not isinstance(error, Fenced)

    async def sit_out(self, error: LogError, warn: Callable[..., None], text: str, wait_s: float = 0.0) -> None:
        """Warns with ``text``, in which ``%s`` stands for the error, and waits. Raises an error that is not to be
        retried."""
        if not self.forgives(error):
            raise error
        warn(text, error)
        await asyncio.sleep(wait_s)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What all clients of a log have done since it was made, closed ones included. Bytes are those of values."""

    read_bytes: int = 0
    unread: int = 0  # records that retention had deleted before they were read
    written_bytes: int = 0


class OpenConsumers:
    """The poll times of all consumers that a log has made and that are not closed."""

    def __init__(self) -> None:
        self._times: list[PollTimes] = []
        self._lock = threading.Lock()
        self._closed = PollTimes()  # the sums of those that were closed and are forgotten

    def add(self) -> PollTimes:
        times = PollTimes()
        with self._lock:
            still_open = self.polls()
            for closed in (each for each in self._times if each not in still_open):
                self._closed.read_bytes += closed.read_bytes
                self._closed.unread += closed.unread
            self._times = [*still_open, times]
        return times

    def polls(self) -> list[PollTimes]:
        return [times for times in self._times if not times.closed]

    def traffic(self, written_bytes: int = 0) -> Traffic:
        with self._lock:
            counted = [self._closed, *self._times]
            read, unread = sum(each.read_bytes for each in counted), sum(each.unread for each in counted)
        return Traffic(read, unread, written_bytes)
