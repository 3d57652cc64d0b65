"""What has been settled on one partition, in 8 bytes for each mark: which rollouts have ended, which attempts have been
retried, and which have won.

The adapter writes marks in the transaction of its decisions (`Settled`, on a topic of their own), and reads all of them
before it folds the first record. So a claim that comes back after days is recognised as late.
"""

import struct
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from millstream.schemas.ids import rank
from millstream.schemas.wire.topics import LIFETIMES

FROZEN: Final = 1 << 14  # marks of one sorted array; a set of as many takes 1 MiB, the array 128 KiB


def end_mark(rollout_id: str) -> int:
    return rank("end", rollout_id)


def retry_mark(rollout_id: str, attempt: int) -> int:
    return rank("retry", rollout_id, str(attempt))


def win_mark(attempt_id: str) -> int:
    return rank("won", attempt_id)


def packed(marks: Iterable[int]) -> bytes:
    found = list(marks)
    return struct.pack(f"<{len(found)}Q", *found)


def unpacked(data: bytes) -> tuple[int, ...]:
    """Raises ValueError if these are not whole marks."""
    if len(data) % 8:
        raise ValueError(f"marks have 8 bytes each, these are {len(data)} bytes")
    return struct.unpack(f"<{len(data) // 8}Q", data)


class SettledMarks:
    """A set of marks that forgets those older than ``kept_s``. ``clock`` counts seconds since the epoch.

    Two different things have the same mark with a probability of 2⁻⁶⁴: among ten million, once in a trillion claims.
    """

    def __init__(self, kept_s: float = LIFETIMES.settled_s, clock: Callable[[], float] = time.time) -> None:
        self._kept_s = kept_s
        self._clock = clock
        self._recent: set[int] = set()
        self._frozen: deque[tuple[float, array[int]]] = deque()  # sorted marks, and the time of the newest

    def __contains__(self, mark: int) -> bool:
        if mark in self._recent:
            return True
        for _, marks in self._frozen:
            at = bisect_left(marks, mark)
            if at < len(marks) and marks[at] == mark:
                return True
        return False

    def __len__(self) -> int:
        return len(self._recent) + sum(len(marks) for _, marks in self._frozen)

    def add(self, marks: Iterable[int], time_s: float | None = None) -> None:
        """Adds marks that were written at ``time_s`` (default: now)."""
        self._recent.update(marks)
        if len(self._recent) >= FROZEN:
            now = self._clock()
            self._frozen.append((now if time_s is None else time_s, array("Q", sorted(self._recent))))
            self._recent.clear()
            while self._frozen and self._frozen[0][0] < now - self._kept_s:
                self._frozen.popleft()
