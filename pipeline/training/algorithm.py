"""Port: algorithms, and the groups of finished rollouts that they learn from."""

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
    """Learns from groups. The trainer calls ``update`` once a step, never from two threads at a time."""

    model: Path | None  # Hugging Face folder of the policy; None: no model is served
    groups_per_step: int
    group_size: int

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One step of learning; returns metrics to show. Learns from the trainable members of a group; drops groups
        with fewer than two of them and counts those in ``dropped_groups``."""

    def weights(self) -> Mapping[str, Any]:
        """The policy's current tensors by name, for the model server. Not copies: ``update`` changes them."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to continue exactly: ``weights``, and the rest as tensors and plain data."""

    def load_state(self, state: Mapping[str, Any]) -> None: ...
