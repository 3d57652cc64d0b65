"""What becomes of a rollout, with all records that have to be written for it. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from millstream.consumers.adapter.triplets import ToTriplets, Trace, total_reward, trained_version
from millstream.schemas.errors import CodecError
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.prefixes import share
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd, RolloutTask, Span, Triplet
from millstream.schemas.wire.settled import end_mark, retry_mark, win_mark

Dead = tuple[LogRecord, str, str]  # for the dead-letter topic: record, reason, error


@dataclass(frozen=True, slots=True)
class Retry:
    """The next attempt: its task, and the mark that ensures it is published once."""

    task: RolloutTask
    mark: AttemptEvent
    due: float  # s; not written before then


@dataclass(frozen=True, slots=True)
class Decision:
    """With ``retry`` that alone is written; the rest only if the retry can't be."""

    how: str  # status of the attempt that decided
    end: RolloutEnd
    triplets: tuple[Triplet, ...] = ()
    dead: tuple[Dead, ...] = ()
    retry: Retry | None = None

    @property
    def marks(self) -> tuple[int, ...]:
        """What is settled once it is written."""
        if self.retry is not None:
            return (retry_mark(self.end.rollout_id, self.retry.mark.attempt),)
        if self.end.status == status.SUCCEEDED:
            return end_mark(self.end.rollout_id), win_mark(self.end.attempt_id or "")
        return (end_mark(self.end.rollout_id),)


def success(
    task: RolloutTask, claimed: int, event: AttemptEvent, records: Sequence[LogRecord], to_triplets: ToTriplets
) -> Decision:
    """The decision on a rollout whose attempt has succeeded. ``records`` are the spans between its claim and
    ``event``, in log order. Both the adapter and a replay turn spans into triplets here."""
    end = end_of(task, event.attempt_id, claimed, status.SUCCEEDED, event.time)
    spans, unreadable = decode_spans(records, event.attempt_id)
    counts = Counter(span.source for span in spans if span.source in semconv.COUNTED_SOURCES)
    expected = Counter({source: n for source, n in event.span_counts.items() if n})
    try:
        triplets = tuple(share(to_triplets(Trace(task, event.attempt_id, spans))))
    except Exception as error:  # the user's own code; the rollout ends all the same
        reason = f"the adapter's function failed: {type(error).__name__}: {error}"
        return Decision(status.SUCCEEDED, replace(end, trainable=False, reason=reason), (), unreadable)
    if counts != expected:
        reason = f"spans are missing: the attempt wrote {dict(expected)}, the log holds {dict(counts)}"
        triplets = tuple(replace(t, trainable=False, reason=reason) for t in triplets)
    trainable = any(t.trainable for t in triplets)
    return Decision(
        status.SUCCEEDED,
        replace(
            end,
            turns=len(triplets),
            spans=len(spans),
            reward=total_reward(spans),
            model_version=trained_version(triplets),
            trainable=trainable,
            reason=None if trainable or not triplets else triplets[0].reason,
        ),
        triplets,
        unreadable,
    )


def without_triplets(end: RolloutEnd, reason: str) -> RolloutEnd:
    """The end of a rollout whose triplets can't be written."""
    return replace(end, turns=0, trainable=False, reason=reason, model_version=None)


def decode_spans(records: Sequence[LogRecord], attempt_id: str) -> tuple[list[Span], tuple[Dead, ...]]:
    """The attempt's spans, and all records that can't be decoded."""
    spans: list[Span] = []
    unreadable: list[Dead] = []
    exported: set[tuple[str, str]] = set()
    for record in records:
        try:
            span = codec.decode_as(Span, record.value)
        except CodecError as error:
            unreadable.append((record, "undecodable", str(error)))
            continue
        if span.attempt_id != attempt_id:
            continue
        if span.source == semconv.SOURCE_OTLP:  # exporters resend what was not acknowledged
            if (span.trace_id, span.span_id) in exported:
                continue
            exported.add((span.trace_id, span.span_id))
        spans.append(span)
    return spans, tuple(unreadable)


def end_of(task: RolloutTask, attempt_id: str, claimed: int, outcome: str, ended: int) -> RolloutEnd:
    return RolloutEnd(
        rollout_id=task.rollout_id,
        group_id=task.group_id,
        group_size=task.group_size,
        experiment_id=task.experiment_id,
        mode=task.mode,
        resources_id=task.resources_id,
        status=outcome,
        attempt_id=attempt_id,
        attempts=task.attempt,
        lost_attempts=task.lost_attempts,
        created_at=task.created_at,
        started_at=claimed,
        ended_at=ended,
    )
