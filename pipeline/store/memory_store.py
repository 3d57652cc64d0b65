"""The store in memory: for tests, and for looking at a run that keeps nothing. It has no SQL."""

import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from millstream.consumers.log.port import Log
from millstream.consumers.sink.port import Batch, Unusable
from millstream.pipeline.store.follow import follow_spans
from millstream.pipeline.store.results import (
    Attempt,
    Result,
    Reward,
    Rollout,
    RolloutFilters,
    RolloutOrder,
    Store,
    TripletFilters,
    checked,
    checked_order,
)
from millstream.schemas.control import Resources
from millstream.schemas.errors import CodecError, StoreError
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.prefixes import expand
from millstream.schemas.wire.records import AttemptEvent, Control, Record, RolloutEnd, RolloutTask, Span, Triplet
from millstream.schemas.wire.topics import Topics


class MemoryStore(Store):
    """Also a `Sink`: holds what is written to it for as long as it lives. ``follow`` reads ``log``."""

    def __init__(self, topics: Topics | None = None, log: Log | None = None) -> None:
        self._topics = topics or Topics()
        self._log = log
        self._lock = threading.Lock()  # guards everything below
        self._tasks: dict[str, dict[int, RolloutTask]] = defaultdict(dict)
        self._events: dict[str, dict[int, AttemptEvent]] = defaultdict(dict)  # by offset
        self._ends: dict[str, tuple[int, RolloutEnd]] = {}
        self._spans: dict[str, dict[int, Span]] = defaultdict(dict)  # by offset
        self._triplets: dict[str, dict[tuple[str, int], Triplet]] = defaultdict(dict)
        self._controls: dict[tuple[str, str], Control] = {}

    def write(self, batch: Batch) -> list[Unusable]:
        """See `Sink`. Takes records of any of the topics, in any order and any number of times."""
        pairs, unusable = batch.decoded()
        with self._lock:
            for record, value in pairs:
                try:
                    self._add(record, value)
                except CodecError as error:  # the task within a claim
                    unusable.append(Unusable(record, "undecodable", str(error)))
        return unusable

    def flush(self) -> None:
        """It is as durable as it gets."""

    def _add(self, record: LogRecord, value: Record) -> None:
        if isinstance(value, RolloutTask):
            self._tasks[value.rollout_id].setdefault(value.attempt, value)
        elif isinstance(value, AttemptEvent):
            if value.task is not None:  # as it was claimed, which counts
                self._tasks[value.rollout_id][value.attempt] = codec.decode_as(RolloutTask, value.task)
            self._events[value.rollout_id][record.offset] = value
        elif isinstance(value, RolloutEnd):
            if record.partition.topic == self._topics.events:  # the mark: its offset compares with those of attempts
                known = self._ends.get(value.rollout_id)
                if known is None or record.offset < known[0]:
                    self._ends[value.rollout_id] = record.offset, value
        elif isinstance(value, Span):
            self._spans[value.rollout_id][record.offset] = value
        elif isinstance(value, Triplet):
            self._triplets[value.rollout_id][value.attempt_id, value.turn] = value
        elif isinstance(value, Control):
            known_control = self._controls.get((value.kind, value.name))
            if known_control is None or known_control.created_at <= value.created_at:
                self._controls[value.kind, value.name] = value

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
        order = checked_order(sort_by)
        wanted = checked(filters, RolloutFilters)
        with self._lock:
            found = [self._rollout(r) for r in self._tasks if rollout_ids is None or r in rollout_ids]
        found = sorted((r for r in found if _fits(r, wanted)), key=lambda r: r.rollout_id, reverse=descending)
        having = [r for r in found if getattr(r, order) is not None]
        having.sort(key=lambda r: getattr(r, order), reverse=descending)
        having += [r for r in found if getattr(r, order) is None]
        return having[offset : None if limit is None else offset + limit]

    def attempts(self, rollout_id: str) -> list[Attempt]:
        with self._lock:
            found = [attempt for attempt, _ in self._attempts(rollout_id)]
        return sorted(found, key=lambda a: (a.attempt, a.started_at, a.attempt_id))

    def spans(self, rollout_id: str, *, attempt_id: str | None = None) -> list[Span]:
        with self._lock:
            found = [span for _, span in sorted(self._spans.get(rollout_id, {}).items())]
        return list({_identity(span): span for span in found if attempt_id in (None, span.attempt_id)}.values())

    def triplets(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        limit: int | None = None,
        **filters: Unpack[TripletFilters],
    ) -> list[Triplet]:
        wanted = checked(filters, TripletFilters)
        with self._lock:
            found = [
                replace(
                    triplet,
                    prompt_token_ids=triplet.prompt_token_ids or None,
                    response_token_ids=triplet.response_token_ids or None,
                    response_logprobs=triplet.response_logprobs or None,
                )
                for rollout_id in _chosen(self._triplets, rollout_ids)
                for triplet in self._whole(rollout_id)
                if _fits(triplet, wanted)
            ]
        return found[:limit]

    def _whole(self, rollout_id: str) -> list[Triplet]:
        by_attempt: dict[str, list[Triplet]] = {}
        for (attempt_id, _), triplet in sorted(self._triplets[rollout_id].items()):
            by_attempt.setdefault(attempt_id, []).append(triplet)
        return [triplet for triplets in by_attempt.values() for triplet in expand(triplets)]

    def rewards(
        self, rollout_ids: Sequence[str] | None = None, *, name: str | None = None, limit: int | None = None
    ) -> list[Reward]:
        with self._lock:
            chosen = _chosen(self._spans, rollout_ids)
        found = [
            Reward(
                rollout_id=rollout_id,
                attempt_id=span.attempt_id,
                time=span.start,
                name=span.reward_name or "",
                value=span.reward,
                source=span.source,
                sequence=span.sequence,
                span_id=span.span_id,
            )
            for rollout_id in chosen
            for span in self.spans(rollout_id)
            if span.reward is not None and name in (None, span.reward_name or "")
        ]
        return found[:limit]

    def latest_resources(self, experiment_id: str | None = None) -> Resources | None:
        with self._lock:
            found = [
                control
                for (kind, _), control in self._controls.items()
                if kind == "resources" and experiment_id in (None, control.experiment_id)
            ]
        return Resources.from_control(max(found, key=lambda control: control.name)) if found else None

    def sql(self, query: str, parameters: Mapping[str, Any] | None = None) -> Result:
        raise StoreError("a store in memory has no SQL: open a ClickHouseStore; a chdb:// one needs no server")

    def sql_arrow(self, query: str, parameters: Mapping[str, Any] | None = None) -> Any:
        return self.sql(query, parameters)

    def follow(self, rollout_id: str) -> AsyncIterator[Span]:
        if self._log is None:
            raise StoreError("this MemoryStore was made without a log: there is nothing to follow")
        return follow_spans(self._log, self._topics, rollout_id, self)

    def first_offset(self, rollout_id: str, partition: Partition) -> int:
        """See `follow.Stored`."""
        with self._lock:
            return min(self._events.get(rollout_id, {}), default=0)

    def end_offset(self, rollout_id: str, partition: Partition) -> int | None:
        """See `follow.Stored`."""
        with self._lock:
            return self._ends[rollout_id][0] if rollout_id in self._ends else None

    def spans_before(self, rollout_id: str, offset: int) -> list[Span]:
        """See `follow.Stored`."""
        with self._lock:
            return [span for at, span in sorted(self._spans.get(rollout_id, {}).items()) if at < offset]

    def close(self) -> None:
        """What it holds goes with it."""

    def _rollout(self, rollout_id: str) -> Rollout:
        tasks = self._tasks[rollout_id]
        latest = tasks[max(tasks)]
        tried = sorted(self._attempts(rollout_id), key=lambda found: found[1])
        end = self._ends[rollout_id][1] if rollout_id in self._ends else None
        events = [event for _, event in sorted(self._events.get(rollout_id, {}).items())]
        failed = [attempt for attempt, _ in tried if attempt.error_type]
        excused = not failed or (end is not None and end.status == status.SUCCEEDED)
        triplets = self._triplets.get(rollout_id, {}).values()
        return Rollout(
            rollout_id=rollout_id,
            group_id=latest.group_id,
            group_size=latest.group_size,
            experiment_id=latest.experiment_id,
            mode=latest.mode,
            priority=latest.priority,
            input=latest.input,
            resources_id=latest.resources_id,
            status=end.status if end else status.rollout_status(events),
            attempts=end.attempts if end else len(tried),
            lost_attempts=end.lost_attempts if end else latest.lost_attempts,
            turns=end.turns if end else 0,
            spans=end.spans if end else 0,
            reward=end.reward if end else None,
            model_version=end.model_version if end else None,
            trainable=end.trainable if end else None,
            reason=end.reason if end else None,
            output=next((attempt.output for attempt, _ in tried if attempt.status == status.SUCCEEDED), None),
            error_type="" if excused else failed[-1].error_type,
            error_message="" if excused else failed[-1].error_message,
            created_at=min(task.created_at for task in tasks.values()),
            started_at=min((attempt.started_at for attempt, _ in tried), default=None),
            ended_at=end.ended_at if end else None,
            prompt_tokens=sum(t.prefix_tokens + len(t.prompt_token_ids or b"") // 4 for t in triplets),
            response_tokens=sum(len(t.response_token_ids or b"") // 4 for t in triplets),
            metadata=latest.metadata,
        )

    def _attempts(self, rollout_id: str) -> list[tuple[Attempt, int]]:
        """Each attempt that was claimed, with the offset of its last sign of life."""
        by_attempt: dict[str, dict[int, AttemptEvent]] = defaultdict(dict)
        for offset, event in sorted(self._events.get(rollout_id, {}).items()):
            by_attempt[event.attempt_id][offset] = event
        end = self._ends.get(rollout_id)
        claimed = (
            events for events in by_attempt.values() if any(e.status == status.PREPARING for e in events.values())
        )
        return [_attempt(events, end) for events in claimed]


def _attempt(events: Mapping[int, AttemptEvent], end: tuple[int, RolloutEnd] | None) -> tuple[Attempt, int]:
    """The first terminal event counts, unless the adapter's mark (retry, or the rollout's end) lies before it."""
    own = {offset: event for offset, event in events.items() if event.status != status.RETRY}
    first = next(iter(own.values()))
    retried = next(((offset, event.time) for offset, event in events.items() if event.status == status.RETRY), None)
    mark = retried or (None if end is None else (end[0], end[1].ended_at))
    last_offset, last = next(
        ((offset, event) for offset, event in own.items() if event.status in status.TERMINAL), (None, None)
    )
    # A rollout may end before its attempt is marked: the earlier of the two decides.
    limits = [place for place, _ in (retried or (None, 0), (end[0], 0) if end else (None, 0)) if place is not None]
    over = last is not None and last_offset is not None and all(last_offset < limit for limit in limits)
    final = last if over else None
    live = max(offset for offset, event in own.items() if event.status in (status.PREPARING, status.RUNNING))
    bound = retried[0] if retried else last_offset
    running = any(event.status == status.RUNNING for event in own.values())
    error = final.error if final else None
    return Attempt(
        rollout_id=first.rollout_id,
        attempt_id=first.attempt_id,
        attempt=first.attempt,
        status=final.status if final else status.LOST if mark else status.RUNNING if running else status.PREPARING,
        worker_id=first.worker_id,
        started_at=min(event.time for event in own.values() if event.status == status.PREPARING),
        last_seen=max(event.time for event in own.values()),
        ended_at=final.time if final else mark[1] if mark else None,
        error_type=error.type if error else "",
        error_message=error.message if error else "",
        error_stack=error.stack if error else "",
        span_counts=final.span_counts if final else {},
        output=final.output if final and final.status == status.SUCCEEDED else None,
        metadata=final.metadata if final else {},
    ), live if bound is None else min(live, bound)


def _fits(record: object, wanted: Mapping[str, Any]) -> bool:
    return all(value is None or getattr(record, name) == value for name, value in wanted.items())


def _chosen(held: Collection[str], rollout_ids: Sequence[str] | None) -> list[str]:
    return sorted(held if rollout_ids is None else set(rollout_ids) & set(held))


def _identity(span: Span) -> tuple[Any, ...]:
    """A span that was written twice lies at two offsets."""
    return span.attempt_id, span.source, span.sequence, span.span_id
