"""What a deployment does just now: a fold over the records of its topics, in bounded memory."""

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from millstream.schemas.wire import status
from millstream.schemas.wire.records import AttemptEvent, ErrorInfo, RolloutEnd, RolloutTask, Worker

WINDOW_S: Final = 60.0
REMEMBERED_ROLLOUTS: Final = 20_000  # the ones that nothing was heard of for the longest time go first
REMEMBERED_ENDS: Final = 100_000  # within the window; above it (1,600 rollouts/s) the rate is too low
REMEMBERED_EVENTS: Final = 64  # changes of one rollout's attempts
REMEMBERED_WORKERS: Final = 10_000
QUANTILES: Final = (0.5, 0.9, 0.99)


class _Ended(NamedTuple):
    group: tuple[str, str]  # experiment, mode
    ended_at: int
    succeeded: bool
    latency_s: float
    queued_s: float | None
    retries: int
    lost_attempts: int


@dataclass(slots=True)
class _Rollout:
    group_id: str = ""
    experiment_id: str = ""
    mode: str = ""
    events: deque[AttemptEvent] = field(default_factory=lambda: deque(maxlen=REMEMBERED_EVENTS))
    end: RolloutEnd | None = None


class Kpis:
    """One thread. Records may come twice; ends are counted once for as long as their rollout is remembered."""

    def __init__(self, *, rollouts: int = REMEMBERED_ROLLOUTS) -> None:
        self._limit = rollouts
        self._rollouts: OrderedDict[str, _Rollout] = OrderedDict()
        self._ends: deque[_Ended] = deque(maxlen=REMEMBERED_ENDS)
        self._workers: OrderedDict[str, Worker] = OrderedDict()
        self.ended: Counter[tuple[str, str]] = Counter()  # (mode, status) → rollouts, since the start
        self.retries = 0  # of those rollouts
        self.lost_attempts = 0

    def add(self, record: object) -> None:
        """Takes in a record; those of kinds that say nothing here are left out."""
        if isinstance(record, RolloutTask):
            seen = self._seen(record.rollout_id)
            seen.group_id, seen.experiment_id, seen.mode = record.group_id, record.experiment_id, record.mode
        elif isinstance(record, AttemptEvent):
            self._add_event(self._seen(record.rollout_id), record)
        elif isinstance(record, RolloutEnd):
            self._add_end(self._seen(record.rollout_id), record)
        elif isinstance(record, Worker):
            self._workers[record.worker_id] = record
            self._workers.move_to_end(record.worker_id)
            if len(self._workers) > REMEMBERED_WORKERS:
                self._workers.popitem(last=False)

    def _seen(self, rollout_id: str) -> _Rollout:
        seen = self._rollouts.setdefault(rollout_id, _Rollout())
        self._rollouts.move_to_end(rollout_id)
        if len(self._rollouts) > self._limit:
            self._rollouts.popitem(last=False)
        return seen

    def _add_event(self, seen: _Rollout, event: AttemptEvent) -> None:
        current = next((e.status for e in reversed(seen.events) if e.attempt_id == event.attempt_id), None)
        if seen.end is not None or current == event.status:
            return  # late, or a heartbeat
        # Without what may be large: the task, outputs and states, stacks.
        error = event.error and ErrorInfo(type=event.error.type, message=event.error.message[:500], stack="")
        event = replace(event, task=None, output=None, state=None, error=error, metadata={}, span_counts={})
        if current is None and event.status == status.RUNNING:  # claimed before the first record that we have seen
            seen.events.append(replace(event, status=status.PREPARING))
        if current is None or event.status == status.RETRY or status.may_follow(current, event.status):
            seen.events.append(event)

    def _add_end(self, seen: _Rollout, end: RolloutEnd) -> None:
        if seen.end is not None:
            return
        seen.group_id, seen.experiment_id, seen.mode, seen.end = end.group_id, end.experiment_id, end.mode, end
        queued_s = None if end.started_at is None else (end.started_at - end.created_at) / 1e9
        retries = max(0, end.attempts - 1)
        ok, latency_s = end.status == status.SUCCEEDED, (end.ended_at - end.created_at) / 1e9
        group = end.experiment_id, end.mode
        self._ends.append(_Ended(group, end.ended_at, ok, latency_s, queued_s, retries, end.lost_attempts))
        self.ended[end.mode, end.status] += 1
        self.retries += retries
        self.lost_attempts += end.lost_attempts

    def rollout(self, rollout_id: str) -> dict[str, Any] | None:
        """Where a rollout stands, as JSON; None if it is unknown, or forgotten."""
        seen = self._rollouts.get(rollout_id)
        if seen is None:
            return None
        last = {event.attempt_id: event for event in seen.events}
        end = seen.end
        return {
            "rollout_id": rollout_id,
            "status": status.rollout_status([*seen.events, *([] if end is None else [end])]),
            "group_id": seen.group_id,
            "experiment_id": seen.experiment_id,
            "mode": seen.mode,
            "reward": None if end is None else end.reward,
            "reason": None if end is None else end.reason,
            "attempts": [
                {
                    "attempt_id": event.attempt_id,
                    "attempt": event.attempt,
                    "status": event.status,
                    "worker_id": event.worker_id,
                    "time": event.time,
                    "error": event.error and f"{event.error.type}: {event.error.message}",
                }
                for event in last.values()
            ],
        }

    def snapshot(self, now: int) -> dict[str, Any]:
        """The window that ends ``now`` (ns since the epoch), as JSON: all rollouts, and by experiment and mode."""
        since = now - int(WINDOW_S * 1e9)
        while self._ends and self._ends[0].ended_at < since:
            self._ends.popleft()
        ends = [end for end in self._ends if end.ended_at >= since]
        groups: dict[tuple[str, str], list[_Ended]] = {}
        for end in ends:
            groups.setdefault(end.group, []).append(end)
        alive = [w for w in self._workers.values() if w.last_seen >= since and w.slots]
        slots, running = sum(w.slots for w in alive), sum(w.running for w in alive)
        return {
            "window_s": WINDOW_S,
            **self._summary(ends),
            "runners": len(alive),
            "slots": slots,
            "running": running,
            "utilisation": running / slots if slots else None,
            "groups": [{"experiment": e, "mode": m, **self._summary(g)} for (e, m), g in sorted(groups.items())],
        }

    def _summary(self, ends: Sequence[_Ended]) -> dict[str, Any]:
        return {
            "rollouts": len(ends),
            "rollouts_per_second": len(ends) / WINDOW_S,
            "success_rate": sum(end.succeeded for end in ends) / len(ends) if ends else None,
            "latency_s": quantiles(end.latency_s for end in ends),
            "queued_s": quantiles(end.queued_s for end in ends if end.queued_s is not None),
            "retries": sum(end.retries for end in ends),
            "lost_attempts": sum(end.lost_attempts for end in ends),
        }


def quantiles(values: Iterable[float]) -> dict[str, float | None]:
    """By nearest rank: the smallest value that at least so many are not above. None without values."""
    ranked = sorted(values)
    return {f"p{round(q * 100)}": ranked[math.ceil(q * len(ranked)) - 1] if ranked else None for q in QUANTILES}
