"""Replay: recorded events through the adapter's pure core again, with other functions. No I/O.

The adapter's marks on ``events`` say which attempt ended a rollout, and in which order rollouts ended; a replay decides
neither. So the same functions give the same triplets and ends, byte for byte and in the same order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from millstream.consumers.adapter.decision import success
from millstream.consumers.adapter.triplets import ToTriplets, Trace, to_triplets, total_reward
from millstream.schemas.errors import CodecError
from millstream.schemas.spans import semconv
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd, RolloutTask, Span, Triplet

ToReward = Callable[[Trace], float | None]
"""A reward function: the reward of a whole attempt, or None. Deterministic, without I/O."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replayed rollout. ``partition``: the number of the partition of its events."""

    partition: int
    end: RolloutEnd
    triplets: tuple[Triplet, ...] = ()


@dataclass(slots=True)
class _LoggedRollout:
    claims: dict[str, tuple[RolloutTask, int]] = field(default_factory=dict)  # by attempt: its task, when it began
    spans: list[LogRecord] = field(default_factory=list)
    successes: dict[str, tuple[AttemptEvent, int]] = field(default_factory=dict)  # and how many spans came before


class Replay:
    """Feed it the records of one experiment's events, each partition in log order. ``reward`` replaces all rewards
    that the agents emitted."""

    def __init__(self, experiment_id: str, function: ToTriplets = to_triplets, reward: ToReward | None = None) -> None:
        self._experiment_id = experiment_id
        self._function = function
        self._reward = reward
        self._open: dict[str, _LoggedRollout] = {}
        self.replayed: set[str] = set()  # rollouts
        self.incomplete: set[str] = set()  # rollouts whose end was recorded, but not all records before it
        self.unreadable = 0  # records; the adapter has written dead letters for them

    @property
    def open(self) -> int:
        """Rollouts that have begun and not ended."""
        return len(self._open)

    def apply(self, record: LogRecord) -> Replayed | None:
        """Takes one record. Returns the rollout if the record is its end."""
        try:
            kind = codec.type_of(record.value)
            if kind is Span:
                if (rollout := self._open.get(record.key or "")) is not None:
                    rollout.spans.append(record)
            elif kind is AttemptEvent:
                self._attempt_event(codec.decode_as(AttemptEvent, record.value))
            elif kind is RolloutEnd:
                return self._end(codec.decode_as(RolloutEnd, record.value), record.partition.number)
        except CodecError:
            self.unreadable += 1
        return None

    def _attempt_event(self, event: AttemptEvent) -> None:
        rollout = self._open.get(event.rollout_id)
        if event.status == status.PREPARING and event.task is not None:
            task = codec.decode_as(RolloutTask, event.task)
            if task.experiment_id == self._experiment_id and event.rollout_id not in self.replayed:
                rollout = self._open.setdefault(event.rollout_id, _LoggedRollout())
                rollout.claims.setdefault(event.attempt_id, (task, event.time))
        elif rollout is None:
            return
        elif event.status == status.SUCCEEDED:
            rollout.successes.setdefault(event.attempt_id, (event, len(rollout.spans)))
        elif event.status == status.RETRY and all(t.attempt <= event.attempt for t, _ in rollout.claims.values()):
            del self._open[event.rollout_id]

    def _end(self, mark: RolloutEnd, partition: int) -> Replayed | None:
        if mark.experiment_id != self._experiment_id or mark.rollout_id in self.replayed:
            return None
        rollout = self._open.pop(mark.rollout_id, _LoggedRollout())
        if mark.status != status.SUCCEEDED:
            self.replayed.add(mark.rollout_id)
            return Replayed(partition, mark)
        attempt_id = mark.attempt_id or ""
        if attempt_id not in rollout.claims or attempt_id not in rollout.successes:
            self.incomplete.add(mark.rollout_id)
            return None
        task, claimed = rollout.claims[attempt_id]
        event, spans = rollout.successes[attempt_id]
        self.replayed.add(mark.rollout_id)
        self.incomplete.discard(mark.rollout_id)
        given: list[float | None] = []

        def function(trace: Trace) -> tuple[Triplet, ...]:
            if self._reward is not None:
                trace = _rewarded(trace, self._reward(trace))
                given.append(total_reward(trace.spans))
            return tuple(self._function(trace))

        decision = success(task, claimed, event, rollout.spans[:spans], function)
        end = replace(decision.end, reward=given[0]) if given else decision.end
        return Replayed(partition, end, decision.triplets)


def _rewarded(trace: Trace, reward: float | None) -> Trace:
    """The trace with this reward at its end, and no other."""
    spans = [s if s.reward is None else replace(s, reward=None, reward_name=None) for s in trace.spans]
    if reward is not None:
        time = spans[-1].end if spans else trace.task.created_at
        spans.append(
            Span(
                trace_id=spans[0].trace_id if spans else "",
                span_id="",
                name="reward",
                kind=semconv.REWARD,
                start=time,
                end=time,
                rollout_id=trace.task.rollout_id,
                attempt_id=trace.attempt_id,
                source=semconv.SOURCE_AGENT,
                sequence=len(spans) + 1,
                reward=reward,
                reward_name="reward",
            )
        )
    return Trace(trace.task, trace.attempt_id, spans)
