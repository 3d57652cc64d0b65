"""Guards: what tells a bad update from a good one. Pure functions of the metrics of the steps so far."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from millstream.schemas.errors import MillstreamError

Steps = Sequence[Mapping[str, float]]  # the metrics of each step, the last one last; with "reward" and "staleness"


class Fault(NamedTuple):
    """Why the last update is to be undone. ``gradual``: those before it are not to be trusted either."""

    reason: str
    gradual: bool = False


Guard = Callable[[Steps], Fault | None]


class Diverged(MillstreamError):
    """Training goes wrong again after each rollback. Says why."""


def non_finite(steps: Steps) -> Fault | None:
    """A metric is NaN or infinite."""
    bad = [name for name, value in steps[-1].items() if not math.isfinite(value)]
    return Fault(f"{', '.join(bad)} not finite") if bad else None


@dataclass(frozen=True, slots=True)
class KlAbove:
    """The policy has moved further than this from the one that made the data, in nats a token."""

    limit: float = 1.0

    def __call__(self, steps: Steps) -> Fault | None:
        kl = steps[-1].get("kl", 0.0)
        return Fault(f"KL is {kl:.3g}, above {self.limit:g}") if kl > self.limit else None


@dataclass(frozen=True, slots=True)
class EntropyBelow:
    """The policy has hardly any choice left, in nats a token, while its reward is below ``reward``: it can't learn any
    more. A policy that earns everything may be that sure."""

    limit: float = 1e-4
    reward: float = 0.5

    def __call__(self, steps: Steps) -> Fault | None:
        entropy = steps[-1].get("entropy", math.inf)
        if entropy >= self.limit or steps[-1]["reward"] >= self.reward:
            return None
        return Fault(f"entropy is {entropy:.3g}, below {self.limit:g}", gradual=True)


@dataclass(frozen=True, slots=True)
class RewardCollapse:
    """The mean reward of the last ``window`` steps has fallen below ``share`` of the best such mean before."""

    share: float = 0.5
    window: int = 3
    least: float = 0.2  # the best mean: below it, rewards are mostly chance

    def __call__(self, steps: Steps) -> Fault | None:
        rewards = [step["reward"] for step in steps]
        means = [sum(rewards[i : i + self.window]) / self.window for i in range(len(rewards) - self.window + 1)]
        if len(means) <= self.window:
            return None
        best, now = max(means[: -self.window]), means[-1]
        if best < self.least or now >= self.share * best:
            return None
        return Fault(f"the reward of {self.window} steps is {now:.3g}, after {best:.3g}", gradual=True)


@dataclass(frozen=True, slots=True)
class WrongWeights:
    """Data that the newest version has made is improbable under it: another version is served than is announced, or
    the server computes something else. ``limit``: of KL in nats a token, before the first optimizer step."""

    limit: float = 0.05

    def __call__(self, steps: Steps) -> Fault | None:
        kl = steps[-1].get("mismatch_kl", 0.0)
        if steps[-1].get("staleness", 0.0) > 0 or kl <= self.limit:
            return None
        return Fault(f"the data are not of the version that they name (KL {kl:.3g}, above {self.limit:g})")


GUARDS: Final[tuple[Guard, ...]] = (non_finite, KlAbove(), EntropyBelow(), RewardCollapse(), WrongWeights())
