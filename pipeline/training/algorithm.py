"""What an algorithm learns from: finished rollouts, in groups that share a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from millstream.schemas.wire.records import RolloutEnd, Triplet


@dataclass(frozen=True, slots=True)
class FinishedRollout:
    """A rollout's end with the triplets of its deciding attempt, by turn."""

    end: RolloutEnd
    triplets: tuple[Triplet, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one group that ended, failures included."""

    group_id: str
    members: tuple[FinishedRollout, ...]


class Algorithm(Protocol):
    """Learns from groups. The trainer calls ``update`` once a step, never from two threads."""

    model: Path | None  # Hugging Face folder of the policy that it trains; None if it trains none
    groups_per_step: int
    group_size: int

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One step of learning; returns what to show of it. Uses a group's trainable members, drops groups with fewer
        than two of them and counts those in ``dropped_groups``."""

    def weights(self) -> Mapping[str, Any]:
        """The policy's tensors as of now, for the model server (copied by whoever keeps them)."""

    def state(self) -> dict[str, Any]:
        """All that a checkpoint has to hold to go on exactly: weights, optimizer, random state."""

    def load_state(self, state: Mapping[str, Any]) -> None: ...
