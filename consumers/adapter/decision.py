"""What becomes of a rollout, with all records that have to be written for it. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from millstream.consumers.adapter.triplets import ToTriplets, Trace, total_reward, total_tokens, trained_version
from millstream.schemas.errors import CodecError
from millstream.schemas.import_path import error_message
from millstream.schemas.spans import semconv
from millstream.schemas.spans.text import LONGEST, cut
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.prefixes import share
from millstream.schemas.wire.records import AttemptEvent, Record, RolloutEnd, RolloutTask, Span, Triplet
from millstream.schemas.wire.settled import end_mark, retry_mark, win_mark
from millstream.schemas.wire.trainable import bad_reward, bad_tokens

RECORD_BYTES: Final = 1000  # of a record beside its long fields

Dead = tuple[LogRecord, str, str]  # for the dead-letter topic: record, reason, error


@dataclass(frozen=True, slots=True)
class Retry:
    """The next attempt: its task, and the mark that ensures it is published once."""

    task: RolloutTask
    mark: AttemptEvent
    due: float  # s; not written before then


@dataclass(frozen=True, slots=True)
class Decision:
    """With ``retry`` that alone is written; the rest only if the retry can't be.

    Triplets are encoded where the decision is made: one that can't be encoded decides what becomes of its rollout."""

    how: str  # status of the attempt that decided
    end: RolloutEnd
    triplets: tuple[Triplet, ...] = ()
    encoded: tuple[bytes, ...] = ()  # the triplets
    dead: tuple[Dead, ...] = ()
    retry: Retry | None = None
    reduced: bool = False  # to what is always small: its dead letters go without their bodies

    @property
    def size(self) -> int:
        """Bytes of its records, estimated."""
        tasks = [record.value for record, _, _ in self.dead] if self.retry is None else [self.retry.task]
        return RECORD_BYTES + sum(map(len, self.encoded)) + sum(map(_size, tasks))

    def reduce(self, reason: str) -> "Decision":
        """The same outcome without the records that are too large, for this ``reason``."""
        return replace(self, end=without_triplets(self.end, reason), triplets=(), encoded=(), retry=None, reduced=True)

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
    missing = None
    if counts != expected:
        missing = f"spans are missing: the attempt wrote {dict(expected)}, the log holds {dict(counts)}"
    try:
        trace = Trace(task, event.attempt_id, spans)
        checked = [_checked(triplet, end, missing) for triplet in to_triplets(trace)]
        prompt_tokens, response_tokens = total_tokens(checked, trace.spans)
        triplets = tuple(share(checked))
        encoded = tuple(map(codec.encode, triplets))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own code, even sys.exit(); the rollout ends all the same
        reason = f"the adapter's function failed: {type(error).__name__}: {error_message(error)}"
        end = replace(end, spans=len(spans), trainable=False, reason=cut(reason))
        return Decision(status.SUCCEEDED, end, dead=unreadable)
    trainable = any(t.trainable for t in triplets)
    return Decision(
        status.SUCCEEDED,
        replace(
            end,
            turns=len(triplets),
            spans=len(spans),
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            reward=total_reward(spans),
            model_version=trained_version(triplets),
            trainable=trainable,
            reason=None if trainable or not triplets else triplets[0].reason,
        ),
        triplets,
        encoded,
        unreadable,
    )


def without_triplets(end: RolloutEnd, reason: str) -> RolloutEnd:
    """The end of a rollout whose triplets can't be written."""
    return replace(
        end, turns=0, prompt_tokens=0, response_tokens=0, trainable=False, reason=cut(reason), model_version=None
    )


def _checked(triplet: Triplet, end: RolloutEnd, missing: str | None) -> Triplet:
    """The triplet, not trainable if spans are ``missing`` or its numbers can't be trained on. Raises TypeError and
    ValueError if it is not a triplet of the attempt."""
    if type(triplet) is not Triplet:
        raise TypeError(f"it made a {type(triplet).__name__}, not a Triplet")
    if (triplet.rollout_id, triplet.attempt_id) != (end.rollout_id, end.attempt_id):
        raise ValueError(f"it made a triplet of attempt {triplet.attempt_id} of rollout {triplet.rollout_id}")
    reason = missing
    if triplet.reward is not None and bad_reward(triplet.reward):
        reason = reason or f"its reward is {triplet.reward:g}"
        triplet = replace(triplet, reward=None)
    if triplet.trainable and reason is None:
        reason = bad_tokens(triplet.prompt_token_ids, triplet.response_token_ids, triplet.response_logprobs)
    if triplet.reason is not None and len(triplet.reason) > LONGEST:
        triplet = replace(triplet, reason=cut(triplet.reason))
    return triplet if reason is None else replace(triplet, trainable=False, reason=reason)


def _size(value: bytes | Record) -> int:
    if isinstance(value, RolloutTask):
        return RECORD_BYTES + len(value.input) + len(value.state or b"") + sum(map(len, value.metadata.values()))
    return RECORD_BYTES + (len(value) if isinstance(value, bytes) else 0)


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
