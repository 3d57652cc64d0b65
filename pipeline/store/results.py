"""The store as people ask it: the protocol, what it answers, and its asynchronous form."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, get_args

from millstream.schemas.control import Resources
from millstream.schemas.wire.records import Span, Triplet

P = ParamSpec("P")
R = TypeVar("R")

RolloutOrder = Literal[
    "created_at", "started_at", "ended_at", "queued_s", "duration_s", "reward", "attempts", "turns", "model_version"
]
"""What rollouts can be sorted by."""

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


class RolloutFilters(TypedDict, total=False):
    """Rollouts that are all of these; what is None or left out may be anything."""

    status: str | None
    experiment_id: str | None
    group_id: str | None
    mode: str | None
    model_version: str | None


class TripletFilters(TypedDict, total=False):
    """As `RolloutFilters`."""

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
    """Where a rollout stands, or how it ended. Times are ns since the epoch, UTC."""

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
    reward: float | None  # the sum of what its deciding attempt emitted
    model_version: str | None  # of its first trainable call; ``mixed`` if they differ
    trainable: bool | None  # None until it has ended
    reason: str | None  # why it isn't trainable, or why it ended
    output: str | None  # what the agent returned, as JSON
    error_type: str  # of the latest attempt that went wrong; empty if none did, or it succeeded in the end
    error_message: str
    created_at: int
    started_at: int | None  # when its first attempt was claimed
    ended_at: int | None  # None: it has not ended
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
    """A reward that an agent emitted: a span that carries one. ``time`` is in ns since the epoch."""

    rollout_id: str
    attempt_id: str
    time: int
    name: str
    value: float
    source: str
    sequence: int
    span_id: str


class Store(Protocol):
    """Everything that happened, as of now. Reads only; every method may be called from any thread.

    `ClickHouseStore` and `MemoryStore` are two; whoever writes another subclasses this one and inherits ``wait_for``
    and ``sql_df``. Each record is there once, however often it was sent. Where a method takes filters, None means any,
    and all that are given have to hold; ``limit`` None means all. Every method raises `StoreError` if the store can't
    be asked.
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
        """Rollouts, newest first unless told otherwise; those that lack what they are sorted by come last.

        Raises ValueError for a ``sort_by`` that is none of `RolloutOrder`, TypeError for a filter that there isn't."""

    def attempts(self, rollout_id: str) -> list[Attempt]:
        """Its attempts in the order of their claims; none if the rollout is unknown or waits."""

    def spans(self, rollout_id: str, *, attempt_id: str | None = None) -> list[Span]:
        """Its spans in log order, of one attempt or of all; late ones too."""

    def triplets(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        limit: int | None = None,
        **filters: Unpack[TripletFilters],
    ) -> list[Triplet]:
        """What was learnt from, or could be, by rollout and turn. Token fields without tokens are None."""

    def rewards(
        self, rollout_ids: Sequence[str] | None = None, *, name: str | None = None, limit: int | None = None
    ) -> list[Reward]:
        """Single rewards of every attempt, by rollout and in log order. That of a whole rollout is `Rollout.reward`."""

    def latest_resources(self, experiment_id: str | None = None) -> Resources | None:
        """The newest version of the resources; None if there is none."""

    def wait_for(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        """Waits until each of these has ended; in the order given. Ids that the store doesn't know yet are waited for.

        Raises TimeoutError after ``timeout_s`` seconds (None: never), which says how many are missing.
        """
        waiting = _Waiting(rollout_ids, timeout_s)
        while waiting.take(self.rollouts(waiting.missing)):
            time.sleep(waiting.pause())
        return waiting.ended

    def sql(self, query: str, parameters: Mapping[str, Any] | None = None) -> Result:
        """Asks in SQL; ``parameters`` fill ``{name:Type}`` and are bound by the engine, never pasted into the text.

        Raises `StoreError` for anything but one statement that reads, and where a store has no SQL."""

    def sql_arrow(self, query: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """As ``sql``; a `pyarrow.Table`."""

    def sql_df(self, query: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """As ``sql``; a `pandas.DataFrame`."""
        return self.sql_arrow(query, parameters).to_pandas()

    def follow(self, rollout_id: str) -> AsyncIterator[Span]:
        """Its spans in log order, as they come: what is there already, then live from the log until it has ended.

        Raises `LogError` if the log can't be read."""

    def close(self) -> None:
        """Lets go of what the store holds."""


def checked_order(sort_by: str) -> str:
    """Names of columns can't be bound: raises ValueError if this is none of `RolloutOrder`."""
    if sort_by not in get_args(RolloutOrder):
        raise ValueError(f"rollouts can't be sorted by {sort_by!r}, but by {', '.join(get_args(RolloutOrder))}")
    return sort_by


def checked(filters: Mapping[str, Any], known: type) -> dict[str, Any]:
    """The same. Raises TypeError for one that there isn't, as Python would of an argument."""
    for name in filters.keys() - known.__annotations__.keys():
        raise TypeError(f"no filter {name!r}; there are {', '.join(known.__annotations__)}")
    return dict(filters)


class AsyncStore:
    """A `Store` for event loops: the same methods, to be awaited. They run in threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.rollouts = _in_thread(store.rollouts)
        self.attempts = _in_thread(store.attempts)
        self.spans = _in_thread(store.spans)
        self.triplets = _in_thread(store.triplets)
        self.rewards = _in_thread(store.rewards)
        self.latest_resources = _in_thread(store.latest_resources)
        self.sql = _in_thread(store.sql)
        self.sql_arrow = _in_thread(store.sql_arrow)
        self.sql_df = _in_thread(store.sql_df)
        self.close = _in_thread(store.close)
        self.follow = store.follow

    async def wait_for(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        """See `Store.wait_for`; holds no thread while it waits."""
        waiting = _Waiting(rollout_ids, timeout_s)
        while waiting.take(await self.rollouts(waiting.missing)):  # noqa: ASYNC110 - the store has no events
            await asyncio.sleep(waiting.pause())
        return waiting.ended


def _in_thread(call: Callable[P, R]) -> Callable[P, Awaitable[R]]:
    def asked(*args: P.args, **kwargs: P.kwargs) -> Awaitable[R]:
        return asyncio.to_thread(call, *args, **kwargs)

    return asked


class _Waiting:
    """Which of some rollouts have not ended, and how long to wait until asking again."""

    def __init__(self, rollout_ids: Sequence[str], timeout_s: float | None) -> None:
        self._ids = list(rollout_ids)
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self._found: dict[str, Rollout] = {}
        self._pause_s = FIRST_PAUSE_S

    @property
    def missing(self) -> list[str]:
        return [rollout_id for rollout_id in self._ids if rollout_id not in self._found]

    @property
    def ended(self) -> list[Rollout]:
        return [self._found[rollout_id] for rollout_id in self._ids]

    def take(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether some are still missing."""
        self._found |= {rollout.rollout_id: rollout for rollout in rollouts if rollout.ended_at is not None}
        return bool(self.missing)

    def pause(self) -> float:
        """Raises TimeoutError if there is no time left."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        if self._timeout_s is None:
            return pause_s
        left_s = self._began + self._timeout_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(
                f"{len(self.missing)} of {len(self._ids)} rollouts have not ended after {self._timeout_s} s, "
                f"{self.missing[0]} among them"
            )
        return min(pause_s, left_s)
