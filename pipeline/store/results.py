"""The protocol of a store, and what its methods return."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Unpack, get_args

from millstream.schemas.errors import StoreError

if TYPE_CHECKING:
    from millstream.schemas.control import Resources
    from millstream.schemas.wire.records import Span, Triplet

RolloutOrder = Literal[
    "created_at", "started_at", "ended_at", "queued_s", "duration_s", "reward", "attempts", "turns", "model_version"
]
"""What rollouts can be sorted by."""

# Between two looks of `Store.wait_for`: the pauses double, so that a short wait is quick and a long one cheap.
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


class RolloutFilters(TypedDict, total=False):
    """Fields that a rollout must have; None or left out: any."""

    status: str | None
    experiment_id: str | None
    group_id: str | None
    mode: str | None
    model_version: str | None


class TripletFilters(TypedDict, total=False):
    """Fields that a triplet must have; None or left out: any."""

    experiment_id: str | None
    group_id: str | None
    mode: str | None
    model_version: str | None
    trainable: bool | None


@dataclass(frozen=True, slots=True)
class Result:
    """Rows of a query, with the names of their columns."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def records(self) -> list[dict[str, Any]]:
        """Each row as a dict by column."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The state of a rollout, or how it ended. Times are ns since the epoch, UTC."""

    rollout_id: str
    group_id: str
    group_size: int
    experiment_id: str
    mode: str
    priority: str
    input: str  # JSON
    resources_id: str | None
    status: str  # queued, running, retrying, succeeded, failed, cancelled
    attempts: int
    lost_attempts: int
    turns: int  # 0 until it has ended, as are ``spans``
    spans: int
    reward: float | None  # sum over the attempt that decided it
    model_version: str | None  # of its first trainable call; ``mixed`` if they differ
    trainable: bool | None  # None until it has ended
    reason: str | None  # why it isn't trainable, or why it ended
    output: str | None  # what the agent returned, as JSON
    error_type: str  # of the latest attempt that failed; empty if none did, or the rollout succeeded
    error_message: str
    created_at: int
    started_at: int | None  # when its first attempt was claimed
    ended_at: int | None  # None: not ended yet
    prompt_tokens: int  # of its triplets
    response_tokens: int
    metadata: Mapping[str, str]

    @property
    def queued_s(self) -> float | None:
        """Seconds from its publication to its first attempt."""
        return None if self.started_at is None else (self.started_at - self.created_at) / 1e9

    @property
    def duration_s(self) -> float | None:
        """Seconds from its first attempt to its end."""
        return None if self.ended_at is None or self.started_at is None else (self.ended_at - self.started_at) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt at a rollout. Times are ns since the epoch, UTC."""

    rollout_id: str
    attempt_id: str
    attempt: int  # 1…; the same number twice if a task was delivered twice
    status: str  # preparing, running, succeeded, failed, timeout, unresponsive, cancelled, lost
    worker_id: str
    started_at: int
    last_seen: int
    ended_at: int | None
    error_type: str  # empty: no error
    error_message: str
    error_stack: str
    span_counts: Mapping[str, int]  # by source, as its terminal event says
    output: str | None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward that an agent emitted. ``time`` is in ns since the epoch."""

    rollout_id: str
    attempt_id: str
    time: int
    name: str
    value: float
    source: str
    sequence: int
    span_id: str


class Store(Protocol):
    """Everything that has happened, as of now. Reads only; any thread may call the methods.

    `ClickHouseStore` is one; a store of your own subclasses this protocol (``examples/store/``). Each record is there
    once, however often it was sent. A filter that is None matches anything, and all filters have to match; ``limit``
    None means all. Every method raises `StoreError` if the store can't be read.
    """

    def rollouts(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        sort_by: RolloutOrder = "created_at",
        descending: bool = True,
        limit: int | None = None,
        offset: int = 0,
        **filters: Unpack[RolloutFilters],
    ) -> list[Rollout]:
        """Rollouts, newest first by default; those without a value to sort by come last.

        Raises ValueError if ``sort_by`` is not a `RolloutOrder`, TypeError for an unknown filter."""

    def attempts(self, rollout_id: str) -> list[Attempt]:
        """The attempts of a rollout in the order of their claims; empty if it is unknown or queued."""

    def spans(self, rollout_id: str, *, attempt_id: str | None = None) -> "list[Span]":
        """The spans of a rollout in log order, of one attempt or of all; including late ones."""

    def triplets(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        limit: int | None = None,
        **filters: Unpack[TripletFilters],
    ) -> "list[Triplet]":
        """Triplets with whole prompts, by rollout and turn. Token fields without tokens are None."""

    def rewards(
        self, rollout_ids: Sequence[str] | None = None, *, name: str | None = None, limit: int | None = None
    ) -> list[Reward]:
        """Single rewards of every attempt, by rollout and in log order. `Rollout.reward` is their sum."""

    def latest_resources(self, experiment_id: str | None = None) -> "Resources | None":
        """The newest version of the resources; None if there is none."""

    def wait_for(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        """Waits until each of these rollouts has ended, and returns them in this order. Waits for unknown ids, too.

        Raises TimeoutError with the number of missing rollouts after ``timeout_s`` seconds (None: never).
        """
        began, pause_s = time.monotonic(), FIRST_PAUSE_S
        ended: dict[str, Rollout] = {}
        missing = list(rollout_ids)
        while True:
            ended |= {found.rollout_id: found for found in self.rollouts(missing) if found.ended_at is not None}
            missing = [rollout_id for rollout_id in rollout_ids if rollout_id not in ended]
            if not missing:
                return [ended[rollout_id] for rollout_id in rollout_ids]
            left_s = LONGEST_PAUSE_S if timeout_s is None else began + timeout_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(
                    f"{len(missing)} of {len(rollout_ids)} rollouts have not ended after {timeout_s} s, {missing[0]} "
                    "among them"
                )
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def sql(self, query: str, parameters: Mapping[str, Any] | None = None) -> Result:
        """Runs a query; ``parameters`` fill ``{name:Type}`` and are bound by the engine, never pasted into the text.

        Raises `StoreError` for anything but one statement that reads, and if the store has no SQL."""
        raise StoreError(f"a {type(self).__name__} has no SQL")

    def sql_arrow(self, query: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """As ``sql``; returns a `pyarrow.Table`."""
        raise StoreError(f"a {type(self).__name__} has no SQL")

    def sql_df(self, query: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """As ``sql``; returns a `pandas.DataFrame`. Raises `StoreError` without pandas, too."""
        table = self.sql_arrow(query, parameters)
        try:
            return table.to_pandas()
        except ImportError as error:
            raise StoreError(f"sql_df needs pandas: install it, or millstream[embedded] ({error})") from error

    def follow(self, rollout_id: str) -> "AsyncIterator[Span]":
        """The spans of a rollout in log order: those that exist, then new ones from the log until the rollout ends.

        Raises `LogError` if the log can't be read, `StoreError` if the store has none."""
        raise StoreError(f"a {type(self).__name__} has no log to follow")

    def close(self) -> None:
        """Releases what the store holds."""


def checked_order(sort_by: str) -> str:
    """The same; raises ValueError unless it is a `RolloutOrder`: names of columns can't be bound."""
    if sort_by not in get_args(RolloutOrder):
        raise ValueError(f"rollouts can't be sorted by {sort_by!r}, only by {', '.join(get_args(RolloutOrder))}")
    return sort_by


def checked(filters: Mapping[str, Any], known: type) -> dict[str, Any]:
    """The same. Raises TypeError for an unknown filter, as Python does for an unknown argument."""
    for name in filters.keys() - known.__annotations__.keys():
        raise TypeError(f"unknown filter {name!r}; there are {', '.join(known.__annotations__)}")
    return dict(filters)
