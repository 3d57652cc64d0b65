"""A consumer group of the in-memory log: who owns which partition, and how far each has been committed.

Bookkeeping only: no lock, no clock, no I/O (`memory_log` holds the lock and tells the time). A rebalance is
cooperative: `share` says who should own a partition; its former owner has to release it before another can claim it.
"""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from millstream.schemas.wire.log import Partition

M = TypeVar("M", bound=Hashable)


def share(
    members: Mapping[M, Collection[str]], partitions: Mapping[str, int], owners: Mapping[Partition, M]
) -> dict[Partition, M]:
    """Who should own what: each topic evenly over its subscribers, with as few moves as that allows."""
    target: dict[Partition, M] = {}
    load: Counter[M] = Counter()
    for topic, count in partitions.items():
        numbers = [Partition(topic, n) for n in range(count)]
        held = {m: [p for p in numbers if owners.get(p) == m] for m, topics in members.items() if topic in topics}
        if not held:
            continue
        # The larger shares go to those who hold most of this topic already, then to those who have least of the others.
        ranked = sorted(held, key=lambda m: (-len(held[m]), load[m]))
        low, larger = divmod(count, len(ranked))
        quota = {m: low + (rank < larger) for rank, m in enumerate(ranked)}
        kept = {p: m for m in ranked for p in held[m][: quota[m]]}
        free = iter([p for p in numbers if p not in kept])
        target |= kept
        for m in ranked:
            target |= dict.fromkeys(islice(free, quota[m] - min(quota[m], len(held[m]))), m)
        load.update(quota)
    return target


@dataclass(slots=True)
class _Member:
    topics: frozenset[str]
    joined: int  # epoch
    expires: float  # on the log's clock; infinite while it polls


class Group(Generic[M]):
    """The members, their partitions and the offsets of one group. A member is whatever stands for a consumer."""

    def __init__(self, name: str, partitions: Mapping[str, int]) -> None:
        self.name = name
        self.epoch = 0  # rises with every change of members or owners
        self.offsets: dict[Partition, int] = {}
        self._partitions = partitions
        self._members: dict[M, _Member] = {}  # in the order of joining
        self._target: dict[Partition, M] = {}
        self._owners: dict[Partition, tuple[M, int]] = {}  # and the epoch at which each became so

    @property
    def members(self) -> Collection[M]:
        return self._members.keys()

    def join(self, member: M, topics: Iterable[str], expires: float) -> None:
        self.epoch += 1
        self._members[member] = _Member(frozenset(topics), self.epoch, expires)
        self._share()

    def leave(self, member: M) -> None:
        """In good order or not: its partitions are free."""
        if self._members.pop(member, None) is not None:
            self.epoch += 1
            self._owners = {p: owner for p, owner in self._owners.items() if owner[0] != member}
            self._share()

    def keep(self, member: M, expires: float) -> None:
        """Puts off the time at which ``member`` counts as dead, unless it has been evicted already."""
        if member in self._members:
            self._members[member].expires = expires

    def evict(self, now: float) -> bool:
        """Drops the members whose time is over; whether there were any."""
        dead = [member for member, state in self._members.items() if state.expires <= now]
        for member in dead:
            self.leave(member)
        return bool(dead)

    def next_expiry(self) -> float:
        return min((state.expires for state in self._members.values()), default=math.inf)

    def to_release(self, member: M) -> set[Partition]:
        """What ``member`` has to give up."""
        return {p for p, (m, _) in self._owners.items() if m == member and self._target.get(p) != member}

    def release(self, member: M, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            if partition in self._owners and self._owners[partition][0] == member:
                del self._owners[partition]
                self.epoch += 1

    def claim(self, member: M) -> set[Partition]:
        """Gives ``member`` what is meant for it and nobody holds any more."""
        found = {p for p, m in self._target.items() if m == member and p not in self._owners}
        if found:
            self.epoch += 1
            self._owners |= dict.fromkeys(found, (member, self.epoch))
        return found

    def owned(self, member: M) -> set[Partition]:
        return {p for p, (m, _) in self._owners.items() if m == member}

    def refusal(self, member: M, partitions: Iterable[Partition], epoch: float = math.inf) -> str | None:
        """Why ``member``, as it was at ``epoch``, may not commit these partitions; None if it may."""
        state = self._members.get(member)
        if state is None or state.joined > epoch:
            return f"this consumer is no longer a member of group {self.name}"
        for partition in partitions:
            owner, since = self._owners.get(partition, (None, 0))
            if owner != member or since > epoch:
                return f"{partition} has been lost to another member of group {self.name}"
        return None

    def _share(self) -> None:
        owners = {p: m for p, (m, _) in self._owners.items()}
        self._target = share({m: s.topics for m, s in self._members.items()}, self._partitions, owners)
