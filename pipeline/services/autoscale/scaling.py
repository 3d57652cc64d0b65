"""How many runners there should be, and which of them may be stopped: a decision from the load, without I/O."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ScalePolicy:
    lowest: int = 1  # runners, of this scaler
    highest: int = 8
    # Less must be wanted for this long before a runner is stopped: starting it again costs seconds of CPU.
    calm_s: float = 30.0


@dataclass(frozen=True, slots=True)
class OwnRunner:
    """One of the scaler's runners, as it has reported itself; ``slots`` None before its first report."""

    number: int
    slots: int | None = None
    running: int = 0  # attempts

    @property
    def idle(self) -> bool:
        return self.slots is not None and self.running == 0


@dataclass(frozen=True, slots=True)
class Decision:
    start: int = 0
    stop: tuple[int, ...] = ()  # their numbers
    wanted: int = 0


@dataclass(slots=True)
class Scaler:
    """Decides look by look. Grows at once, and to what is wanted; shrinks once less has been wanted for ``calm_s``, by
    runners that run nothing. A busy one is never stopped."""

    policy: ScalePolicy
    _slots: int = field(default=0, init=False)  # of one runner, the last that was reported
    _calm_since: float | None = field(default=None, init=False)

    def wanted(self, work: int, others: int) -> int:
        """Runners for ``work``, tasks that wait and attempts that run, of which other runners' slots take their part.
        One until the first has reported how many slots it has."""
        left = max(work - others, 0)
        needed = math.ceil(left / self._slots) if self._slots else min(left, 1)
        return min(max(needed, self.policy.lowest), self.policy.highest)

    def decide(self, now: float, work: int, others: int, own: Sequence[OwnRunner]) -> Decision:
        """``others``: slots of runners that are not this scaler's. ``own``: the runners that are not being stopped."""
        self._slots = max((runner.slots or 0 for runner in own), default=0) or self._slots
        wanted = self.wanted(work, others)
        if len(own) <= wanted:
            self._calm_since = None
            return Decision(wanted - len(own), (), wanted)
        if self._calm_since is None:
            self._calm_since = now
        if now - self._calm_since < self.policy.calm_s:
            return Decision(wanted=wanted)
        idle = [runner.number for runner in own if runner.idle]
        return Decision(0, tuple(sorted(idle, reverse=True)[: len(own) - wanted]), wanted)
