"""The status of a rollout, read from the log on request."""

from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.schemas.errors import CodecError
from millstream.schemas.ids import written_since_ms
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd, RolloutTask
from millstream.schemas.wire.topics import PRIORITIES, Topics, partition_of

StatusRecord = RolloutTask | AttemptEvent | RolloutEnd


async def read_rollout_status(log: Log, topics: Topics, rollout_id: str) -> dict[str, Any] | None:
    """`describe_rollout` of the records that the log still holds; None if it holds none. Reading begins at the time in
    the id, so the cost grows with the rollout's age. Raises `LogUnavailable`."""
    events = [Partition(topics.events, partition_of(rollout_id, topics.partitions))]
    found = await _read(log, events, rollout_id)
    if not found:  # not claimed yet: its task may be in any partition
        tasks = [Partition(topics.tasks(priority), n) for priority in PRIORITIES for n in range(topics.partitions)]
        found = await _read(log, tasks, rollout_id, limit=1)
    return describe_rollout(found) if found else None


async def _read(log: Log, partitions: list[Partition], rollout_id: str, limit: int | None = None) -> list[StatusRecord]:
    found: list[StatusRecord] = []
    async with aclosing(read_to_end(log, partitions, since_ms=written_since_ms(rollout_id))) as records:
        async for record in records:
            if record.key not in (rollout_id, None):  # tasks have no key
                continue
            try:
                value = codec.decode(record.value)
            except CodecError:
                continue  # the role that reads the topic makes a dead letter of it
            if isinstance(value, StatusRecord) and value.rollout_id == rollout_id:
                found.append(value)
                if len(found) == limit:
                    break
    return found


def describe_rollout(records: Iterable[StatusRecord]) -> dict[str, Any]:
    """A rollout as JSON, from its records in log order; there has to be one."""
    events: list[AttemptEvent | RolloutEnd] = []
    attempts: dict[str, AttemptEvent] = {}  # the event of each attempt's last change
    about: RolloutTask | RolloutEnd | None = None
    end: RolloutEnd | None = None
    for record in records:
        if isinstance(record, RolloutTask):
            about = record
        elif isinstance(record, RolloutEnd):
            end = about = end or record
            events.append(end)
        elif end is None:
            if about is None and record.task is not None:
                about = codec.decode_as(RolloutTask, record.task)
            events.append(record)
            last = attempts.get(record.attempt_id)
            current = None if last is None else last.status
            heartbeat = record.status == current
            if record.status == status.RETRY or (status.may_follow(current, record.status) and not heartbeat):
                attempts[record.attempt_id] = record
    return {
        "rollout_id": (about or events[0]).rollout_id,
        "status": status.rollout_status(events),
        "group_id": about and about.group_id,
        "experiment_id": about and about.experiment_id,
        "mode": about and about.mode,
        "reward": end and end.reward,
        "reason": end and end.reason,
        "attempts": [
            {
                "attempt_id": event.attempt_id,
                "attempt": event.attempt,
                "status": event.status,
                "worker_id": event.worker_id,
                "time": event.time,
                "error": event.error and f"{event.error.type}: {event.error.message}",
            }
            for event in attempts.values()
        ],
    }
