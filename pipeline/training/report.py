"""What a training run reports: one `StepReport` a step, and a `Summary` at the end."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from millstream.pipeline.training.groups import FinishedRollout, Group
from millstream.schemas.wire import status
from millstream.schemas.wire.trainable import bad_reward


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of training. Rewards are means over the rollouts that succeeded."""

    step: int
    model_version: str  # of the policy that made the rollouts
    reward: float
    rollouts: int
    failed: int
    rollouts_per_second: float  # since the run started
    spans: int  # since the run started
    seconds: float
    metrics: Mapping[str, float]  # the algorithm's
    epoch: int = 0  # one more after each resume or rollback that abandons steps
    reward_std: float = 0.0  # population standard deviation
    validation_reward: float | None = None  # of the validation that ended during the step
    groups: int = 0  # trained on
    flat_groups: int = 0  # of those, how many taught nothing: all their rewards are alike
    dropped: Mapping[str, int] = field(default_factory=dict)  # groups that were not, by reason
    staleness_mean: float = 0.0  # updates between the policy that made a group and the one that learnt from it
    staleness_max: int = 0
    tokens: int = 0  # of responses that were trained on
    experiment_id: str = ""  # set when the step has ended, as the phases are
    phases: Mapping[str, float] = field(
        default_factory=dict
    )  # seconds; see `Stopwatch`. Empty until the step has ended

    @property
    def idle_share(self) -> float | None:
        """Of the step's time, the share in which the trainer waited for rollouts. None until the step has ended."""
        whole = sum(self.phases.values())
        return self.phases["wait"] / whole if whole else None


@dataclass(slots=True)
class Summary:
    experiment_id: str
    steps: list[StepReport] = field(default_factory=list)
    validation_reward: float | None = None
    validation_failed: int = 0
    seconds: float = 0.0
    rollouts: int = 0
    spans: int = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Summary":
        """From `dataclasses.asdict`, through JSON."""
        return cls(**{**saved, "steps": [StepReport(**step) for step in saved["steps"]]})

    @property
    def first_reward(self) -> float | None:
        return self.steps[0].reward if self.steps else None

    @property
    def rollouts_per_second(self) -> float:
        return self.rollouts / self.seconds if self.seconds else 0.0


def mean_reward(finished: Sequence[FinishedRollout]) -> float:
    """The mean over the rollouts that succeeded, 0 if none did. A rollout without a reward, or with one that can't be
    trained on, counts as 0."""
    rewards = _rewards(finished)
    return statistics.fmean(rewards) if rewards else 0.0


def reward_spread(finished: Sequence[FinishedRollout]) -> float:
    """The population standard deviation of the rewards of which `mean_reward` is the mean."""
    rewards = _rewards(finished)
    return statistics.pstdev(rewards) if rewards else 0.0


def _rewards(finished: Sequence[FinishedRollout]) -> list[float]:
    given = [member.end.reward for member in finished if member.end.status == status.SUCCEEDED]
    return [0.0 if reward is None or bad_reward(reward) else reward for reward in given]


def flat_groups(groups: Iterable[Group]) -> int:
    """How many have rewards that are all alike."""
    return sum(len(set(_rewards(group.members))) < 2 for group in groups)


def failures(finished: Sequence[FinishedRollout]) -> int:
    return sum(member.end.status != status.SUCCEEDED for member in finished)
