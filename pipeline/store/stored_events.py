"""Recorded events out of the store, for a replay of what retention has taken from the log."""

from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter

from millstream.pipeline.store.clickhouse import ClickHouseStore
from millstream.pipeline.store.queries import Ask, place_of, read_columns, read_placed_spans
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd, RolloutTask, Span

ROLLOUTS = 200  # read at once

PLACE = ("topic", "partition", "offset")
TASK = [name for name in codec.CODECS[RolloutTask].field_names if name != "state"]
EVENT = ("rollout_id", "attempt_id", "attempt", "status", "worker_id", "time", "lease_s", "span_counts")
END = codec.CODECS[RolloutEnd].field_names


def stored_events(store: ClickHouseStore, experiment_id: str, without: Collection[str]) -> Iterator[LogRecord]:
    """For each rollout that has ended, in the order of the ends on each partition: the claim of the attempt that
    succeeded, its spans and its end in log order, then the adapter's mark. All that `replay.Replay` reads; what the
    store doesn't keep (a task's saved state) is missing. Raises `StoreError`."""
    filters = {"experiment_id": experiment_id}
    ends = read_columns(store.sql, (*END, *PLACE), "rollout_ends_raw FINAL", filters, order="partition, offset")
    todo = [(place_of(row), RolloutEnd(**row)) for row in ends if row["rollout_id"] not in without]
    for at in range(0, len(todo), ROLLOUTS):
        some = todo[at : at + ROLLOUTS]
        before = _before(store.sql, [end for _, end in some if end.status == status.SUCCEEDED])
        for place, end in some:
            yield from sorted(before.get(end.rollout_id, ()), key=attrgetter("offset"))
            yield _record(place, end.ended_at, end)


def _before(ask: Ask, ends: Sequence[RolloutEnd]) -> dict[str, list[LogRecord]]:
    """Claim, spans and success of each rollout."""
    attempt_of = {end.rollout_id: end.attempts for end in ends}
    of_rollouts = {"rollout_id": list(attempt_of)}
    of_attempts = {**of_rollouts, "attempt_id": [end.attempt_id for end in ends]}
    found: dict[str, list[LogRecord]] = {rollout_id: [] for rollout_id in attempt_of}
    tasks = {
        row["rollout_id"]: codec.encode(RolloutTask(**row))
        for row in read_columns(ask, TASK, "tasks_raw FINAL", of_rollouts, order="attempt")
        if row["attempt"] == attempt_of[row["rollout_id"]]
    }
    filters = {**of_attempts, "status": [status.PREPARING, status.SUCCEEDED]}
    for row in read_columns(ask, (*EVENT, *PLACE), "attempts_raw FINAL", filters, order="offset"):
        task = tasks.get(row["rollout_id"]) if row["status"] == status.PREPARING else None
        place, event = place_of(row), AttemptEvent(**row, task=task)
        found[event.rollout_id].append(_record(place, event.time, event))
    for place, span in read_placed_spans(ask, of_attempts):
        found[span.rollout_id].append(_record(place, span.start, span))
    return found


def _record(place: tuple[Partition, int], time_ns: int, value: AttemptEvent | RolloutEnd | Span) -> LogRecord:
    return LogRecord(*place, time_ns // 1_000_000, value.rollout_id, value)
