"""One rollout's attempt, as the log still holds it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from millstream.consumers.adapter.triplets import Trace
from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.schemas.errors import CodecError, ConfigError
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd, RolloutTask, Span
from millstream.schemas.wire.topics import Topics, partition_of


@dataclass(slots=True)
class _LoggedAttempt:
    task: RolloutTask
    spans: list[Span] = field(default_factory=list)
    over: bool = False


async def read_trace(
    log: Log, topics: Topics, rollout_id: str, attempt_id: str | None = None
) -> tuple[Trace, RolloutEnd | None]:
    """The attempt that decided the rollout (the latest, if none has; or the one asked for), with the end that the
    adapter wrote. Raises `ConfigError` if the log does not hold it."""
    partition = Partition(topics.events, partition_of(rollout_id, topics.partitions))
    found = [record async for record in read_to_end(log, [partition]) if record.key == rollout_id]
    return trace_of(rollout_id, found, attempt_id)


def trace_of(
    rollout_id: str, records: Iterable[LogRecord], attempt_id: str | None = None
) -> tuple[Trace, RolloutEnd | None]:
    """As `read_trace`, from the rollout's records in log order. Spans behind an attempt's terminal event are late and
    left out, as the adapter does; so are records that can't be read."""
    attempts: dict[str, _LoggedAttempt] = {}
    end = None
    for record in records:
        try:
            value = codec.decode(record.value)
        except CodecError:
            continue  # the adapter has made a dead letter of it
        if isinstance(value, RolloutEnd):
            end = end or value
        elif isinstance(value, Span) and value.attempt_id in attempts:
            if not attempts[value.attempt_id].over:
                attempts[value.attempt_id].spans.append(value)
        elif isinstance(value, AttemptEvent):
            if value.task is not None and value.attempt_id not in attempts:
                attempts[value.attempt_id] = _LoggedAttempt(codec.decode_as(RolloutTask, value.task))
            elif value.attempt_id in attempts and value.status in status.TERMINAL:
                attempts[value.attempt_id].over = True
    chosen = attempt_id or (end and end.attempt_id) or next(reversed(attempts), None)
    if chosen not in attempts or chosen is None:
        what = f"attempt {attempt_id}" if attempt_id else "claim"
        raise ConfigError(
            f"the log holds no {what} of rollout {rollout_id}; was it claimed, and is it younger than the retention?"
        )
    return Trace(attempts[chosen].task, chosen, attempts[chosen].spans), end
