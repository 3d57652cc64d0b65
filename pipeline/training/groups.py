"""Groups of finished rollouts, what algorithms learn from; and which versions of the policy may have made them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from millstream.schemas.wire import status
from millstream.schemas.wire.records import RolloutEnd, Triplet
from millstream.schemas.wire.trainable import TOKEN_BYTES
from millstream.schemas.wire.versions import MIXED, from_text


@dataclass(frozen=True, slots=True)
class FinishedRollout:
    """A rollout's end with the triplets of its deciding attempt, by turn."""

    end: RolloutEnd
    triplets: tuple[Triplet, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one group, failures included."""

    group_id: str
    members: tuple[FinishedRollout, ...]


def trainable_turns(member: FinishedRollout) -> list[Triplet]:
    """The turns of a rollout that can be trained on: none, unless it has succeeded."""
    if not member.end.trainable or member.end.status != status.SUCCEEDED:
        return []
    return [triplet for triplet in member.triplets if triplet.trainable]


@dataclass(slots=True)
class Lineage:
    """The versions of a run's policy, ``RUN.EPOCH.STEP``. An epoch ends where a rollback, or a resume from an earlier
    checkpoint, abandons the steps after it; the next epoch counts on from there. So a version is never two sets of
    weights."""

    run: str
    epoch: int = 0
    step: int = 0
    ends: dict[int, int] = field(default_factory=dict)  # earlier epoch → its last step that counts

    @property
    def version(self) -> str:
        return f"{self.run}.{self.epoch}.{self.step}"

    def restart(self, step: int) -> None:
        """Abandons the steps after ``step``, in a new epoch."""
        self.ends = {epoch: min(end, step) for epoch, end in self.ends.items()} | {self.epoch: step}
        self.epoch, self.step = self.epoch + 1, step

    def step_of(self, version: str) -> int:
        """The step of a version of this run. Raises ValueError for any other, and says why."""
        run, *rest = version.rsplit(".", 2)
        if run != self.run or len(rest) != 2 or not all(part.isdecimal() for part in rest):
            raise ValueError(f"made by version {version}, which is none of run {self.run}")
        epoch, step = map(int, rest)
        if epoch > self.epoch or (epoch == self.epoch and step > self.step):
            raise ValueError(f"made by version {version}, newer than the trainer's {self.version}")
        if step > self.ends.get(epoch, self.step):
            raise ValueError(f"made by version {version}, which was abandoned")
        return step

    def to_json(self) -> dict[str, Any]:
        ends = {str(epoch): step for epoch, step in self.ends.items()}
        return {"run": self.run, "epoch": self.epoch, "step": self.step, "ends": ends}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Lineage":
        return cls(value["run"], value["epoch"], value["step"], {int(k): v for k, v in value["ends"].items()})


def steps_of(triplet: Triplet, lineage: Lineage) -> list[int]:
    """The steps whose policies made the tokens of a turn: one, unless weights changed meanwhile. Raises ValueError with
    the reason if the version of any token is unknown, abandoned or newer than the trainer's.

    A mixed turn needs no correction: each token's log-probability is that of the policy which sampled it, so the
    token's importance ratio is right as it is. What several policies have sampled in turn is a sample of one behaviour
    policy, which is each of them at its tokens (AReaL: Fu et al., arXiv:2505.24298, proposition 1).
    """
    if triplet.response_versions is None:
        if triplet.model_version == MIXED:
            raise ValueError("weights changed while it was sampled, and the model server did not say at which tokens")
        return [lineage.step_of(triplet.model_version or "")]
    tokens = len(triplet.response_token_ids or b"") // TOKEN_BYTES
    versions = from_text(triplet.response_versions, tokens)
    steps = []
    for (first, version), (end, _) in zip(versions, (*versions[1:], (tokens, "")), strict=True):
        try:
            steps.append(lineage.step_of(version))
        except ValueError as error:
            raise ValueError(f"tokens {first} to {end - 1}: {error}") from error
    return steps


def checked(group: Group, lineage: Lineage) -> tuple[Group, int | None]:
    """The group without the turns of versions that it must not have: they are no longer trainable, and say why. And the
    oldest step that made a token of the others; None if no turn names a version."""
    steps: list[int] = []

    def turn(triplet: Triplet) -> Triplet:
        if not triplet.trainable or (triplet.model_version is None and triplet.response_versions is None):
            return triplet
        try:
            steps.extend(steps_of(triplet, lineage))
        except ValueError as error:
            return replace(triplet, trainable=False, reason=f"turn {triplet.turn}: {error}")
        return triplet

    members = tuple(FinishedRollout(m.end, tuple(map(turn, m.triplets))) for m in group.members)
    return Group(group.group_id, members), min(steps, default=None)
