"""Where a trainer's time goes: divides wall time among the phases of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

Phase = Literal["wait", "update", "save", "publish", "other"]
PHASES: Final[tuple[Phase, ...]] = ("wait", "update", "save", "publish", "other")


@dataclass(frozen=True, slots=True)
class Lap:
    """From the end of the lap before, or the start, to its own. Times are ns since the epoch; ``phases`` are seconds,
    and sum to the time between the two."""

    started_at: int
    ended_at: int
    phases: dict[Phase, float]


class Stopwatch:
    """Counts each moment in one phase: that of the innermost `phase` block that is open, else ``other``. Where blocks
    of several tasks overlap, the one that was entered last counts. For use on one event loop.

    ``clock`` counts seconds. ``now`` is the time in ns since the epoch; it may jump, the length of a lap does not.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, now: Callable[[], int] = time.time_ns) -> None:
        self._clock, self._now = clock, now
        self._open: list[tuple[Phase, object]] = []  # the blocks that are open, in the order in which they were entered
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._counted = clock()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the time within the block."""
        entered = (name, object())
        self._count()
        self._open.append(entered)
        try:
            yield
        finally:
            self._count()
            self._open.remove(entered)

    def lap(self) -> Lap:
        """Ends a lap, and begins the next. Open blocks stay open."""
        self._count()
        ended_at = self._now()
        spent, self._spent = self._spent, dict.fromkeys(PHASES, 0.0)
        return Lap(ended_at - round(sum(spent.values()) * 1e9), ended_at, spent)

    def _count(self) -> None:
        moment = self._clock()
        running = self._open[-1][0] if self._open else "other"
        self._spent[running] += moment - self._counted
        self._counted = moment
