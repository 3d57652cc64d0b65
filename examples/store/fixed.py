"""A store of your own: it answers from lists, for the tests of code that reads a `ms.Store`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import millstream as ms
from millstream.schemas.wire.records import Span


@dataclass
class FixedStore(ms.Store):
    """Each list in the order that the protocol promises; the filters are the records' own fields."""

    held_rollouts: list[ms.Rollout] = field(default_factory=list)
    held_attempts: list[ms.Attempt] = field(default_factory=list)
    held_spans: list[Span] = field(default_factory=list)
    held_triplets: list[ms.Triplet] = field(default_factory=list)
    held_rewards: list[ms.Reward] = field(default_factory=list)
    resources: ms.Resources | None = None

    def rollouts(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        sort_by: str = "created_at",
        descending: bool = True,
        limit: int | None = None,
        offset: int = 0,
        **filters: Any,
    ) -> list[ms.Rollout]:
        found = sorted(matching(self.held_rollouts, rollout_ids, filters), key=lambda r: getattr(r, sort_by) or 0)
        return (found[::-1] if descending else found)[offset:][:limit]

    def attempts(self, rollout_id: str) -> list[ms.Attempt]:
        return matching(self.held_attempts, [rollout_id], {})

    def spans(self, rollout_id: str, *, attempt_id: str | None = None) -> list[Span]:
        return matching(self.held_spans, [rollout_id], {"attempt_id": attempt_id})

    def triplets(
        self, rollout_ids: Sequence[str] | None = None, *, limit: int | None = None, **filters: Any
    ) -> list[ms.Triplet]:
        return matching(self.held_triplets, rollout_ids, filters)[:limit]

    def rewards(
        self, rollout_ids: Sequence[str] | None = None, *, name: str | None = None, limit: int | None = None
    ) -> list[ms.Reward]:
        return matching(self.held_rewards, rollout_ids, {"name": name})[:limit]

    def latest_resources(self, experiment_id: str | None = None) -> ms.Resources | None:
        return self.resources


def matching(records: list[Any], rollout_ids: Sequence[str] | None, filters: dict[str, Any]) -> list[Any]:
    return [
        record
        for record in records
        if (rollout_ids is None or record.rollout_id in rollout_ids)
        and all(value is None or getattr(record, name) == value for name, value in filters.items())
    ]
