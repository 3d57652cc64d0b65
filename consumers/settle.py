"""The adapter's decisions, without any I/O: folds one partition of ``events`` and says how each rollout ends.

preparing ──► open ──succeeded──────────────────────────► Decision(succeeded)
               │  └──failed, timeout, cancelled, lost──► Decision, unless another attempt of it lives
               └──lease ran out───────────────────────► Decision(failed), likewise
RolloutEnd (our own mark, or a predecessor's) ─────────► ended: whatever still comes is late, and ignored
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from millstream.consumers.triplets import ToTriplets, Trace, total_reward, trained_version
from millstream.schemas import codec, status
from millstream.schemas.errors import CodecError
from millstream.schemas.log import LogRecord
from millstream.schemas.records import AttemptEvent, DeadLetter, RolloutEnd, RolloutTask, Span, Triplet


@dataclass(slots=True)
class Attempt:
    """An attempt that has been claimed and has not ended."""

    attempt_id: str
    task: RolloutTask
    status: str
    claimed: int  # ns, by the runner's clock
    last_seen: float  # s, by ours
    lease_s: float


@dataclass(slots=True)
class OpenRollout:
    """What is known of a rollout between its first claim and its end; spans stay encoded until it settles."""

    first_offset: int
    attempts: dict[str, Attempt] = field(default_factory=dict)  # those that live
    seen: set[str] = field(default_factory=set)  # every attempt ever claimed
    spans: list[LogRecord] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Decision:
    """How a rollout ends, with everything that has to be written for it."""

    end: RolloutEnd
    triplets: tuple[Triplet, ...] = ()
    unreadable: tuple[tuple[LogRecord, str], ...] = ()  # spans that could not be decoded, for the dead-letter topic


class PartitionFold:
    """The state of one partition. Feed it every record in log order; clocks are arguments, in seconds."""

    def __init__(self, to_triplets: ToTriplets) -> None:
        self._to_triplets = to_triplets
        self.open: dict[str, OpenRollout] = {}  # in order of their first offset
        self.ended: dict[str, int] = {}  # rollout → offset at which its end was seen or decided
        self.decided: dict[str, Decision] = {}  # not yet written
        self.refused: set[int] = set()  # offsets whose dead letter has been written
        self.ignored: Counter[str] = Counter()

    def scan(self, record: LogRecord) -> None:
        """First pass after an assignment: only the marks of what has been decided already."""
        try:
            kind = codec.type_of(record.value)
            if kind is RolloutEnd:
                self.ended[codec.decode_as(RolloutEnd, record.value).rollout_id] = record.offset
            elif kind is DeadLetter:
                self.refused.add(codec.decode_as(DeadLetter, record.value).offset)
        except CodecError:
            pass  # `apply` reports it

    def apply(self, record: LogRecord, now: float) -> None:
        """Folds one record. Raises `CodecError` if it can't be read; the state is then as before."""
        kind = codec.type_of(record.value)
        if kind is AttemptEvent:
            self._attempt_event(codec.decode_as(AttemptEvent, record.value), record.offset, now)
        elif kind is Span:
            rollout = self.open.get(record.key or "")
            if rollout is not None:
                rollout.spans.append(record)
            else:
                self.ignored["late_span"] += 1
                if record.key not in self.ended:
                    codec.decode(record.value)  # nobody else will look at it: is it a span at all?
        elif kind is RolloutEnd:
            end = codec.decode_as(RolloutEnd, record.value)
            self._forget(end.rollout_id)
            self.ended[end.rollout_id] = record.offset
        elif kind is DeadLetter:
            self.refused.add(codec.decode_as(DeadLetter, record.value).offset)
        else:
            raise CodecError(f"{record.place}: {kind.__name__} has no place among the events", record=kind.__name__)

    def expire(self, now: float, not_before: float, time_ns: int) -> None:
        """Ends what has been silent for longer than its lease; nobody's silence counts from before ``not_before``.
        ``time_ns`` is what the ends are stamped with."""
        for rollout_id, rollout in list(self.open.items()):
            for attempt in list(rollout.attempts.values()):
                if now - max(attempt.last_seen, not_before) > attempt.lease_s:
                    cause = f"no heartbeat for {attempt.lease_s:g} s"
                    self._finish(rollout_id, rollout, attempt, status.LOST, time_ns, cause)

    def written(self, rollout_id: str, offset: int) -> None:
        """The decision is in the log now; ``offset`` is at or before its mark."""
        self._forget(rollout_id)
        self.ended.setdefault(rollout_id, offset)

    def without_triplets(self, rollout_id: str, reason: str) -> None:
        """The decision's triplets can't be written: the rollout ends without them, and says why."""
        decision = self.decided[rollout_id]
        end = replace(decision.end, turns=0, trainable=False, reason=reason, model_version=None)
        self.decided[rollout_id] = replace(decision, end=end, triplets=())

    def oldest_open(self, without: set[str]) -> int | None:
        """First offset of the oldest rollout that still needs its records, those in ``without`` left out."""
        return next((r.first_offset for rid, r in self.open.items() if rid not in without), None)

    def prune(self, committed: int) -> None:
        """Forgets ends below the committed offset: nobody reads those records again."""
        self.ended = {rid: offset for rid, offset in self.ended.items() if offset >= committed}
        self.refused = {offset for offset in self.refused if offset >= committed}

    def _forget(self, rollout_id: str) -> None:
        self.open.pop(rollout_id, None)
        self.decided.pop(rollout_id, None)

    def _attempt_event(self, event: AttemptEvent, offset: int, now: float) -> None:
        if event.rollout_id in self.ended or event.rollout_id in self.decided:
            self.ignored["late_event"] += 1
            return
        rollout = self.open.get(event.rollout_id)
        if event.status == status.PREPARING:
            self._claim(event, rollout, offset, now)
            return
        attempt = rollout.attempts.get(event.attempt_id) if rollout is not None else None
        if rollout is None or attempt is None or not status.may_follow(attempt.status, event.status):
            self.ignored["late_event"] += 1
            return
        attempt.status, attempt.last_seen, attempt.lease_s = event.status, now, event.lease_s
        if event.status == status.SUCCEEDED:
            self.decided[event.rollout_id] = self._success(rollout, attempt, event)
        elif event.status in status.TERMINAL:
            cause = f"{event.error.type}: {event.error.message}" if event.error else event.status
            self._finish(event.rollout_id, rollout, attempt, event.status, event.time, cause)

    def _claim(self, event: AttemptEvent, rollout: OpenRollout | None, offset: int, now: float) -> None:
        if event.task is None:
            raise CodecError("AttemptEvent.task: missing in a preparing event", record="AttemptEvent", field="task")
        if rollout is None:
            rollout = self.open[event.rollout_id] = OpenRollout(offset)
        elif event.attempt_id in rollout.attempts:
            rollout.attempts[event.attempt_id].last_seen = now
            return
        elif event.attempt_id in rollout.seen:
            self.ignored["late_event"] += 1
            return
        task = codec.decode_as(RolloutTask, event.task)
        rollout.seen.add(event.attempt_id)
        rollout.attempts[event.attempt_id] = Attempt(
            event.attempt_id, task, event.status, event.time, now, event.lease_s
        )

    def _finish(
        self, rollout_id: str, rollout: OpenRollout, attempt: Attempt, how: str, ended: int, cause: str
    ) -> None:
        """An attempt is over without success. A claim whose runner lost the task leaves another attempt alive: the
        rollout then goes on with that one."""
        del rollout.attempts[attempt.attempt_id]
        if rollout.attempts or rollout_id in self.decided:
            return
        outcome = status.CANCELLED if how == status.CANCELLED else status.FAILED
        self.decided[rollout_id] = Decision(
            replace(
                _end(attempt, outcome, ended),
                losses=attempt.task.losses + (how == status.LOST),
                trainable=False,
                reason=f"{how}: {cause}",
            )
        )

    def _success(self, rollout: OpenRollout, attempt: Attempt, event: AttemptEvent) -> Decision:
        end = _end(attempt, status.SUCCEEDED, event.time)
        spans, unreadable = _decode_spans(rollout.spans, attempt.attempt_id)
        counts = Counter(span.source for span in spans)
        expected = Counter({source: n for source, n in event.span_counts.items() if n})
        try:
            triplets = tuple(self._to_triplets(Trace(attempt.task, attempt.attempt_id, spans)))
        except Exception as error:  # a user's own code; the rollout has ended all the same
            reason = f"the adapter's function failed: {type(error).__name__}: {error}"
            return Decision(replace(end, trainable=False, reason=reason), (), unreadable)
        if counts != expected:
            reason = f"spans are missing: the attempt wrote {dict(expected)}, the log holds {dict(counts)}"
            triplets = tuple(replace(t, trainable=False, reason=reason) for t in triplets)
        trainable = any(t.trainable for t in triplets)
        return Decision(
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


def _decode_spans(records: list[LogRecord], attempt_id: str) -> tuple[list[Span], tuple[tuple[LogRecord, str], ...]]:
    spans, unreadable = [], []
    for record in records:
        try:
            span = codec.decode_as(Span, record.value)
        except CodecError as error:
            unreadable.append((record, str(error)))
            continue
        if span.attempt_id == attempt_id:
            spans.append(span)
    return spans, tuple(unreadable)


def _end(attempt: Attempt, outcome: str, ended: int) -> RolloutEnd:
    task = attempt.task
    return RolloutEnd(
        rollout_id=task.rollout_id,
        group_id=task.group_id,
        group_size=task.group_size,
        experiment_id=task.experiment_id,
        mode=task.mode,
        resources_id=task.resources_id,
        status=outcome,
        attempt_id=attempt.attempt_id,
        attempts=task.attempt,
        losses=task.losses,
        created_at=task.created_at,
        started_at=attempt.claimed,
        ended_at=ended,
    )
