"""Port: algorithms, at two heights. An `Algorithm` decides everything, given a `Run`; a `Learner` only turns groups of
rollouts into new weights, and `algorithms.policy_gradient.PolicyGradient` does the rest."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from millstream.pipeline.training.groups import Group
from millstream.pipeline.training.run import Run


class Algorithm(Protocol):
    """Learns from rollouts until ``run.stop`` says that it is done."""

    @property
    def model(self) -> Path | None:
        """Hugging Face folder of the policy; None: no model is served."""

    async def run(self, run: Run) -> None: ...


class Learner(Protocol):
    """A policy that learns. One call at a time, from any thread."""

    @property
    def model(self) -> Path | None:
        """As for `Algorithm`."""

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One step of learning; returns metrics. Learns from the trainable members of a group; drops groups with fewer
        than two of them and counts those in ``dropped_groups``. Raises FloatingPointError, with unchanged weights, if
        the step would not be finite."""

    def weights(self) -> Mapping[str, Any]:
        """The policy's current tensors by name, for the model server. Not copies: ``update`` changes them."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to continue exactly: ``weights``, and the rest as tensors and plain data."""

    def load_state(self, state: Mapping[str, Any]) -> None: ...


class _Function:
    model: Path | None = None

    def __init__(self, function: Callable[[Run], Awaitable[None]]) -> None:
        self._function = function

    async def run(self, run: Run) -> None:
        await self._function(run)


def algorithm(function: Callable[[Run], Awaitable[None]]) -> Algorithm:
    """Makes an `Algorithm` of an async function; a decorator."""
    return _Function(function)
