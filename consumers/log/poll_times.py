"""When consumers polled, so that a health check can see a stuck role without wrapping its consumers."""

import time
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class PollTimes:
    """Of one consumer, in seconds of ``time.monotonic``. Any thread may read them; a poll runs within ``with``."""

    last_poll: float | None = None  # when the last poll returned or raised; None before the first
    polling_since: float | None = None  # when the current poll began; None between polls
    closed: bool = False
    unread: int = 0  # records that retention had deleted before this consumer read them

    def __enter__(self) -> None:
        self.polling_since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.last_poll, self.polling_since = time.monotonic(), None


class OpenConsumers:
    """The poll times of all consumers that a log has made and that are not closed."""

    def __init__(self) -> None:
        self._times: list[PollTimes] = []

    def add(self) -> PollTimes:
        times = PollTimes()
        self._times = [*self.polls(), times]
        return times

    def polls(self) -> list[PollTimes]:
        return [times for times in self._times if not times.closed]
