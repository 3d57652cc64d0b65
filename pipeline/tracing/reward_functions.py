"""A tracer's reward functions: called with the agent's result, within its attempt."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from millstream.consumers.runner.agent import optional_parameters
from millstream.pipeline.tracing.blocking import run_blocking
from millstream.producers.agent.attempt import AttemptContext
from millstream.producers.agent.emit import emit_reward
from millstream.schemas.wire.records import Span

PARAMETERS = ("rollout", "spans")  # that a reward function may have after the result


@dataclass(slots=True)
class Seen:
    """What an attempt has done so far."""

    spans: list[Span] = field(default_factory=list)  # made in this process
    result: Any = None
    rewarded: bool = False  # the reward functions have been called


class RewardFunctions:
    """Reward functions in the order of their addition, for any number of attempts at once."""

    def __init__(self) -> None:
        self._functions: list[tuple[Callable[..., Any], tuple[str, ...]]] = []
        self._seen: WeakKeyDictionary[AttemptContext, Seen] = WeakKeyDictionary()

    def __bool__(self) -> bool:
        return bool(self._functions)

    def add(self, function: Callable[..., Any]) -> None:
        self._functions.append((function, optional_parameters(function, PARAMETERS)))

    def watch(self, attempt: AttemptContext | None) -> Seen:
        """Collects the attempt's spans from now on."""
        if attempt is None:
            return Seen()
        seen = self._seen.get(attempt)
        if seen is None:
            seen = self._seen[attempt] = Seen()
            attempt.watch(seen.spans.append)
        return seen

    def reward(self, attempt: AttemptContext | None, result: Any) -> None:
        """Emits the functions' rewards for the result. Raises what a function raises."""
        for name, answer in self._answers(attempt, result):
            _emit(name, run_blocking(answer) if inspect.isawaitable(answer) else answer)

    async def reward_async(self, attempt: AttemptContext | None, result: Any) -> None:
        for name, answer in self._answers(attempt, result):
            _emit(name, await answer if inspect.isawaitable(answer) else answer)

    def _answers(self, attempt: AttemptContext | None, result: Any) -> Iterator[tuple[str, Any]]:
        seen = self.watch(attempt)
        seen.result, seen.rewarded = result, True
        for function, names in self._functions:
            known = {"rollout": None if attempt is None else attempt.rollout, "spans": tuple(seen.spans)}
            name = getattr(function, "__name__", "reward")
            yield name, function(result, **{each: known[each] for each in names})


def _emit(name: str, answer: Any) -> None:
    if answer is not None:
        emit_reward(answer, None if isinstance(answer, Mapping) else name)
