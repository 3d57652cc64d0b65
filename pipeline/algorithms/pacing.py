"""When groups of rollouts are asked for, and which of them make the next batch. Pure: no clock, no log.

Admission as in AReaL (Fu et al., arXiv:2505.24298, section 5.1): with staleness η and version v, at most (η + v + 1)·B
groups have been asked for, so that the policy does not run ahead of its data and nothing is wasted. A group that takes
long is overtaken by younger ones and may still grow older than η, so there is a cap as well (as in prime-rl's
``max_off_policy_steps``), which makes the bound true.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Pacing:
    """Groups are known by their ordinal. ``batch``: groups in a step. With ``max_staleness`` 0 each step trains on the
    groups that its own policy made, and waits for all of them. Groups older than ``drop_above`` versions are dropped.
    """

    batch: int
    max_staleness: int = 0
    drop_above: int = 0
    step: int = 0  # updates so far
    next: int = 0  # ordinal of the next group
    open: dict[int, int] = field(default_factory=dict)  # group → step at which it was asked for
    ended: dict[int, int] = field(default_factory=dict)  # of these, group → oldest step that made its tokens

    def admit(self) -> list[int]:
        """The groups to ask for now."""
        count = (self.max_staleness + 1) * self.batch - len(self.open)
        new = list(range(self.next, self.next + max(count, 0)))
        self.open |= dict.fromkeys(new, self.step)
        self.next += len(new)
        return new

    def end(self, group: int, oldest: int | None) -> None:
        """The group has ended. ``oldest``: the oldest step whose policy made a part of it, if known."""
        self.ended[group] = self.open[group] if oldest is None else oldest

    def drop(self, group: int) -> None:
        """The group will not be trained on: another one may be asked for in its place."""
        del self.open[group]
        self.ended.pop(group, None)

    def too_old(self) -> list[int]:
        """The groups that have ended and that the cap drops. One that runs on may be younger than its question."""
        return [group for group in self.ended if self.staleness(group) > self.drop_above]

    def ready(self) -> list[int] | None:
        """The groups of the next batch, the oldest first; None if not enough have ended."""
        oldest = sorted(self.ended)[: self.batch]
        return oldest if len(oldest) == self.batch else None

    def staleness(self, group: int) -> int:
        return self.step - self.ended[group]

    def trained(self, groups: list[int]) -> None:
        """The policy has been updated with these groups, and is the next version."""
        for group in groups:
            self.drop(group)
        self.step += 1
