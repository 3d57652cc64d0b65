"""Reads a rollout's attempts from the log."""

from dataclasses import dataclass, field

from millstream.consumers.adapter.triplets import Trace
from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.schemas.errors import CodecError, ConfigError
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd, RolloutTask, Span
from millstream.schemas.wire.topics import Topics, partition_of


@dataclass(slots=True)
class LoggedAttempt:
    task: RolloutTask
    spans: list[Span] = field(default_factory=list)  # in log order
    over: bool = False


async def read_attempts(
    log: Log, topics: Topics, rollout_id: str, start: int = 0
) -> tuple[dict[str, LoggedAttempt], RolloutEnd | None]:
    """The rollout's attempts by id, in the order of their claims, and its end; from offset ``start`` of its partition.
    As in the adapter, spans after an attempt's terminal event are late and left out, and so are undecodable records."""
    partition = Partition(topics.events, partition_of(rollout_id, topics.partitions))
    attempts: dict[str, LoggedAttempt] = {}
    end = None
    async for record in read_to_end(log, [partition], {partition: start} if start else None):
        if record.key != rollout_id:
            continue
        try:
            value = codec.decode(record.value)
        except CodecError:
            continue  # the adapter has written a dead letter for it
        if isinstance(value, RolloutEnd):
            end = end or value
        elif isinstance(value, Span) and value.attempt_id in attempts:
            if not attempts[value.attempt_id].over:
                attempts[value.attempt_id].spans.append(value)
        elif isinstance(value, AttemptEvent):
            if value.task is not None and value.attempt_id not in attempts:
                attempts[value.attempt_id] = LoggedAttempt(codec.decode_as(RolloutTask, value.task))
            elif value.attempt_id in attempts and value.status in status.TERMINAL:
                attempts[value.attempt_id].over = True
    return attempts, end


async def read_trace(
    log: Log, topics: Topics, rollout_id: str, attempt_id: str | None = None
) -> tuple[Trace, RolloutEnd | None]:
    """The given attempt, or the one that decided the rollout (else the latest), with the rollout's end.

    Raises `ConfigError` if the log does not hold it."""
    attempts, end = await read_attempts(log, topics, rollout_id)
    chosen = attempt_id or (end and end.attempt_id) or next(reversed(attempts), None)
    if chosen not in attempts or chosen is None:
        what = f"attempt {attempt_id}" if attempt_id else "claim"
        raise ConfigError(
            f"the log holds no {what} of rollout {rollout_id}; was it claimed, and is it younger than the retention?"
        )
    return Trace(attempts[chosen].task, chosen, attempts[chosen].spans), end
