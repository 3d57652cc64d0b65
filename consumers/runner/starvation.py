"""Detects a runner that gets no tasks although there are more and more."""

import time
from collections.abc import Callable


class Starvation:
    """A consumer that polls and gets nothing although its lag grows is stuck. ``clock`` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._minimum: int | None = None  # lag
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """How long the lag has been above its minimum while nothing was received."""
        since = self._since  # read once: other threads call this
        return 0.0 if since is None else self._clock() - since

    def reset(self) -> None:
        """Call it when something was received or nothing was wanted, when the assignment has changed, and when the log
        was unavailable."""
        self._minimum = self._since = None

    def observe(self, lag: int) -> None:
        if self._minimum is None or lag <= self._minimum:
            self._minimum, self._since = lag, None
        elif self._since is None:
            self._since = self._clock()
