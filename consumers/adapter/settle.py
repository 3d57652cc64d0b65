"""The adapter's decisions, without I/O: folds one partition of ``events`` and decides what becomes of each rollout.

preparing ──► open ──succeeded──────────────────────────► Decision(succeeded)
               │  └──failed, timeout, cancelled, lost──► Decision, unless another claim of the attempt lives: another
               └──lease expired, too large────────────► attempt after a backoff (`retry`), or the end; likewise
retry mark (our own, or a predecessor's) ──────────────► waits in tasks; claims of that attempt are late from now on
RolloutEnd (our own mark, or a predecessor's) ─────────► ended: later records are late, and ignored

What predecessors have settled is loaded before the first record (`load`), so the fold may begin anywhere at or before
the oldest open rollout, and a claim that comes back after days is late.

All live claims of a rollout have one attempt number: a claim of a higher one means that the lower were given up.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from millstream.consumers.adapter.decision import Dead, Decision, Retry, decode_spans, end_of, success
from millstream.consumers.adapter.retry import BACKOFF_S, PROXY_BACKOFF_S, backoff_s, is_outage, next_task, refusal
from millstream.consumers.adapter.triplets import ToTriplets
from millstream.producers.tasks import expired, unreadable_task
from millstream.schemas.errors import CodecError
from millstream.schemas.ids import id_time_ms
from millstream.schemas.spans.text import cut
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.records import AttemptEvent, ErrorInfo, RolloutEnd, RolloutTask, Settled, Span
from millstream.schemas.wire.settled import SettledMarks, end_mark, retry_mark, unpacked, win_mark
from millstream.schemas.wire.topics import LIFETIMES

ROLE: Final = "adapter"
LEASE: Final = "lease"
TOO_LARGE: Final = "too_large"
SPAN_BYTES: Final = 500  # memory of a span beside its body


@dataclass(frozen=True, slots=True)
class FoldPolicy:
    # A claim that has never begun to run is most likely one whose commit failed: the group delivers its task to another
    # runner once it has noticed. Retried earlier, it would run twice. So it expires after this many leases.
    claim_leases: int = 3
    attempt_bytes: int = 64 << 20  # kept of an open rollout: a thousand calls with prompts of 64 KB
    backoff_s: Mapping[str, tuple[float, float]] = field(default_factory=lambda: BACKOFF_S)
    settled_s: float = LIFETIMES.settled_s


@dataclass(slots=True)
class FoldedAttempt:
    """A claim of an attempt that has not ended."""

    attempt_id: str
    task: RolloutTask
    status: str
    claim: LogRecord  # its place; the body is `task`
    claimed: int  # ns, by the runner's clock
    last_seen: float  # s, by ours
    lease_s: float
    state: bytes | None


@dataclass(slots=True)
class OpenRollout:
    """A rollout between its first claim and its end. Spans stay encoded until it settles."""

    first_offset: int
    number: int  # of the attempt that is claimed
    attempts: dict[str, FoldedAttempt] = field(default_factory=dict)  # the live ones; none once it is decided
    seen: set[str] = field(default_factory=set)  # every attempt ever claimed
    spans: list[LogRecord] = field(default_factory=list)
    size: int = 0  # bytes, estimated


class PartitionFold:
    """The state of one partition. Feed it every record in log order. Clocks are arguments, in seconds. ``random`` is
    the jitter's source. ``on_late`` is called for each record that came too late: late_event, late_span, and
    zombie_result for a success of an attempt that had been given up, or of a rollout that another attempt had ended.
    Records that are read again are late again."""

    def __init__(
        self,
        to_triplets: ToTriplets,
        policy: FoldPolicy = FoldPolicy(),
        *,
        random: Callable[[], float] = random.random,
        on_late: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._policy = policy
        self._to_triplets = to_triplets
        self._random = random
        self.open: dict[str, OpenRollout] = {}  # in order of their first offset
        self.settled = SettledMarks(policy.settled_s)
        self.decided: dict[str, Decision] = {}  # not yet written; these are still open
        self.refused: set[int] = set()  # offsets whose dead letter a predecessor has written
        self.unreadable: list[Dead] = []  # spans of failed attempts; the fold's owner removes them
        self._on_late = on_late
        self.size = 0  # bytes of all open rollouts, estimated
        self._time_ms = 0  # of the record folded last

    def load(self, settled: Settled, time_ms: int, start: int) -> None:
        """Takes over what has been settled before. Call it for all of it before the first `apply`. ``start``: the
        offset from which events will be read. Raises ValueError if the record is malformed."""
        self.settled.add(unpacked(settled.marks), time_ms / 1000)
        self.refused.update(offset for offset in settled.refused if offset >= start)

    def apply(self, record: LogRecord, now: float) -> None:
        """Folds one record. Raises `CodecError` if it can't be decoded; the state is then unchanged."""
        kind = codec.type_of(record.value)
        self._time_ms = record.timestamp
        if kind is AttemptEvent:
            self._attempt_event(codec.decode_as(AttemptEvent, record.value), record, now)
        elif kind is Span:
            key = record.key or ""
            rollout = self.open.get(key)
            if rollout is not None and rollout.attempts:
                rollout.spans.append(record)
                self._grow(rollout, _size(record))
                if rollout.size > (limit := self._policy.attempt_bytes):
                    message = f"the adapter keeps at most {limit:,} bytes of an attempt"
                    self.too_large(key, message, record.timestamp * 1_000_000, now)
            else:
                self._on_late("late_span")
                codec.decode(record.value)  # raises if it is not a span: it is decoded nowhere else
        elif kind is RolloutEnd:
            self._ended(codec.decode_as(RolloutEnd, record.value))
        else:
            raise CodecError(f"{record.place}: {kind.__name__} does not belong among events")

    def expire(self, now: float, not_before: float, time_ns: int) -> None:
        """Gives up attempts without a heartbeat for longer than their lease, or ``claim_leases`` of it if they have
        never begun to run. Time before ``not_before`` does not count. Ends and marks are stamped with ``time_ns``."""
        for rollout_id, rollout in list(self.open.items()):
            for attempt in list(rollout.attempts.values()):
                patience = attempt.lease_s * (self._policy.claim_leases if attempt.status == status.PREPARING else 1)
                if now - max(attempt.last_seen, not_before) > patience:
                    error = ErrorInfo(type=LEASE, message=f"no heartbeat for {patience:g} s", stack="")
                    self._finish(rollout_id, rollout, attempt, status.LOST, error, time_ns, now)

    def too_large(self, rollout_id: str, message: str, time_ns: int, now: float) -> None:
        """Fails the live attempt of a rollout whose records take too much memory, and drops them."""
        rollout = self.open[rollout_id]
        *others, attempt = rollout.attempts.values()
        for other in others:
            del rollout.attempts[other.attempt_id]
        error = ErrorInfo(type=TOO_LARGE, message=message, stack="")
        self._finish(rollout_id, rollout, attempt, status.FAILED, error, time_ns, now)

    def largest(self) -> tuple[int, str]:
        """Size and id of the open rollout that takes most memory; (0, "") without one."""
        return max(((rollout.size, rollout_id) for rollout_id, rollout in self.open.items()), default=(0, ""))

    def ready(self, now: float) -> Iterator[tuple[str, Decision]]:
        """The decisions that may be written: all but retries that wait for their backoff."""
        return (item for item in self.decided.items() if item[1].retry is None or item[1].retry.due <= now)

    def written(self, rollout_id: str) -> None:
        """The decision has been committed."""
        decision = self.decided[rollout_id]
        if decision.retry is not None:
            self._retried(decision.retry.mark)
        else:
            self._ended(decision.end)

    def unwritable(self, rollout_id: str, reason: str) -> bool:
        """The decision's task or triplets can't be written: the rollout ends without them, for this ``reason``. False
        if that has been tried: then the end is only noted here, and not written."""
        decision = self.decided[rollout_id]
        if decision.reduced:
            self._ended(decision.end)
            return False
        self.decided[rollout_id] = decision.reduce(reason)
        return True

    def oldest_open(self, without: set[str]) -> int | None:
        """First offset of the oldest open rollout, those in ``without`` excepted."""
        return next((r.first_offset for rid, r in self.open.items() if rid not in without), None)

    def _ended(self, end: RolloutEnd) -> None:
        self._forget(end.rollout_id)
        self._settle(*Decision(end.status, end).marks)

    def _retried(self, mark: AttemptEvent) -> None:
        rollout = self.open.get(mark.rollout_id)
        if rollout is not None and rollout.number <= mark.attempt:
            self._forget(mark.rollout_id)
        self._settle(retry_mark(mark.rollout_id, mark.attempt))

    def _settle(self, *marks: int) -> None:
        self.settled.add([mark for mark in marks if mark not in self.settled])  # our own are read again

    def _forget(self, rollout_id: str) -> None:
        self.decided.pop(rollout_id, None)
        if (rollout := self.open.pop(rollout_id, None)) is not None:
            self.size -= rollout.size

    def _grow(self, rollout: OpenRollout, size: int) -> None:
        rollout.size += size
        self.size += size

    def _decide(self, rollout_id: str, rollout: OpenRollout, decision: Decision) -> None:
        """Its later records are ignored."""
        self.decided[rollout_id] = decision
        rollout.attempts.clear()
        rollout.spans.clear()
        self._grow(rollout, -rollout.size)

    def _late(self, event: AttemptEvent) -> None:
        self._on_late("late_event")
        # The event that ended the rollout may be read again.
        if event.status == status.SUCCEEDED and win_mark(event.attempt_id) not in self.settled:
            self._on_late("zombie_result")

    def _attempt_event(self, event: AttemptEvent, record: LogRecord, now: float) -> None:
        rollout = self.open.get(event.rollout_id)
        if event.status == status.RETRY:
            self._retried(event)
        elif event.status == status.PREPARING:
            self._claim(event, rollout, record, now)
        elif rollout is None and not self._settled_before(event.rollout_id, event.attempt, record.timestamp):
            self._without_claim(event, record)
        elif (
            rollout is None
            or (attempt := rollout.attempts.get(event.attempt_id)) is None
            or not status.may_follow(attempt.status, event.status)
        ):
            self._late(event)
        else:
            attempt.status, attempt.last_seen, attempt.lease_s = event.status, now, event.lease_s
            if event.state is not None:
                self._grow(rollout, len(event.state) - len(attempt.state or b""))
                attempt.state = event.state
            if event.status == status.SUCCEEDED:
                decision = success(attempt.task, attempt.claimed, event, rollout.spans, self._to_triplets)
                self._decide(event.rollout_id, rollout, decision)
            elif event.status in status.TERMINAL:
                error = event.error or ErrorInfo(type=event.status, message="no reason given", stack="")
                retry_override = event.metadata.get("retry")
                self._finish(event.rollout_id, rollout, attempt, event.status, error, event.time, now, retry_override)

    def _claim(self, event: AttemptEvent, rollout: OpenRollout | None, record: LogRecord, now: float) -> None:
        if event.task is None:
            raise CodecError("AttemptEvent.task: missing in a preparing event")
        if rollout is not None and event.attempt_id in rollout.attempts:
            rollout.attempts[event.attempt_id].last_seen = now
            return
        task = codec.decode_as(RolloutTask, event.task)
        if task.rollout_id != event.rollout_id:
            raise CodecError("AttemptEvent.task: that of another rollout")
        decision = self.decided.get(event.rollout_id)
        if rollout is None:
            late = self._settled_before(task.rollout_id, task.attempt, record.timestamp)
        else:
            late = (
                task.attempt < rollout.number
                or event.attempt_id in rollout.seen
                or (decision is not None and decision.retry is None)
            )
        if late:
            self._late(event)
            return
        # It seemed lost and waits for its backoff, but a runner has its task: no retry is needed.
        self.decided.pop(event.rollout_id, None)
        if rollout is None:
            rollout = self.open[event.rollout_id] = OpenRollout(record.offset, task.attempt)
        elif task.attempt > rollout.number:
            rollout.attempts.clear()
            rollout.number = task.attempt
        rollout.seen.add(event.attempt_id)
        self._grow(rollout, len(event.task))
        rollout.attempts[event.attempt_id] = FoldedAttempt(
            event.attempt_id,
            task,
            event.status,
            replace(record, value=b"", headers={}),
            event.time,
            now,
            event.lease_s,
            task.state,
        )

    def _settled_before(self, rollout_id: str, attempt: int, time_ms: int) -> bool:
        """Whether what was written at ``time_ms`` has come back: of an ended rollout, or of an attempt that was
        retried. A rollout older than marks are kept has ended: its task was ended when it was half as old."""
        if end_mark(rollout_id) in self.settled or retry_mark(rollout_id, attempt) in self.settled:
            return True
        with suppress(ValueError):  # an id of a foreign publisher, without a time
            return time_ms - id_time_ms(rollout_id) > self._policy.settled_s * 1000
        return False

    def _without_claim(self, event: AttemptEvent, record: LogRecord) -> None:
        """Ends a rollout whose claim can't be read: the task is in there, so it can be neither trained on nor retried.
        Each attempt's claim is stored before anything else of it."""
        task = unreadable_task(event.rollout_id, event.time)
        end = end_of(replace(task, attempt=event.attempt), event.attempt_id, event.time, status.FAILED, event.time)
        reason = "no_claim: the attempt's claim was deleted before the adapter read it, or is a dead letter"
        self.open[event.rollout_id] = OpenRollout(record.offset, event.attempt)
        self.decided[event.rollout_id] = Decision(status.FAILED, replace(end, trainable=False, reason=reason))

    def _finish(
        self,
        rollout_id: str,
        rollout: OpenRollout,
        attempt: FoldedAttempt,
        how: str,
        error: ErrorInfo,
        ended: int,
        now: float,
        retry_override: str | None = None,
    ) -> None:
        """Ends an attempt without success. If another claim of it is alive (its runner lost the task), the rollout
        goes on with that."""
        del rollout.attempts[attempt.attempt_id]
        if rollout.attempts:
            return
        self.unreadable += decode_spans(rollout.spans, attempt.attempt_id)[1]
        task = attempt.task
        outcome = status.CANCELLED if how == status.CANCELLED else status.FAILED
        reason = cut(f"{how}: {error.message}" if error.type == LEASE else f"{how}: {error.type}: {error.message}")
        end = replace(
            end_of(task, attempt.attempt_id, attempt.claimed, outcome, ended),
            lost_attempts=task.lost_attempts + (how == status.LOST),
            trainable=False,
            reason=reason,
        )
        if how == status.CANCELLED:
            self._decide(rollout_id, rollout, Decision(how, end))
            return
        refused = refusal(task, how, retry_override, cause=error.type)
        if refused is None and expired(rollout_id, self._time_ms):
            refused = "expired"  # a runner would end it unrun
        dead = (replace(attempt.claim, value=replace(task, state=attempt.state)), refused or TOO_LARGE, reason)
        retry = None
        if refused is None:
            following = next_task(task, how, attempt.state, cause=error.type)
            times = following.lost_attempts if how == status.LOST else task.attempt - task.lost_attempts
            mark = AttemptEvent(
                rollout_id=rollout_id,
                attempt_id=attempt.attempt_id,
                attempt=task.attempt,
                status=status.RETRY,
                worker_id=ROLE,
                time=ended,
                lease_s=attempt.lease_s,
                error=error,
            )
            limits = PROXY_BACKOFF_S if is_outage(task, how, error.type) else self._policy.backoff_s[how]
            retry = Retry(following, mark, now + backoff_s(limits, times, self._random))
        letters = () if retry_override == status.RETRY_REFUSED else (dead,)
        self._decide(rollout_id, rollout, Decision(how, end, dead=letters, retry=retry))


def _size(record: LogRecord) -> int:
    """Bytes that a span takes, estimated from its long parts if it is not encoded."""
    span = record.value
    if isinstance(span, bytes):
        return SPAN_BYTES + len(span)
    assert isinstance(span, Span)
    tokens = (span.prompt_token_ids, span.response_token_ids, span.response_logprobs)
    return 2 * SPAN_BYTES + sum(map(len, span.attributes.values())) + sum(len(part or b"") for part in tokens)
