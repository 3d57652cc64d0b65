"""The adapter's decisions: how a rollout ends, for each history of its events."""

from dataclasses import replace

import pytest
from factories import call, event, reward, span, task

from millstream.consumers.settle import PartitionFold
from millstream.consumers.triplets import to_triplets
from millstream.schemas import codec
from millstream.schemas.errors import CodecError, UnknownSchema
from millstream.schemas.log import LogRecord, Partition

EVENTS = Partition("millstream.events", 0)
TASK = task()
RID = TASK.rollout_id


class Feeder:
    """A partition fed record by record, encoded as on Kafka."""

    def __init__(self, adapter=to_triplets):
        self.fold = PartitionFold(adapter)
        self.offset = 0

    def __call__(self, *values, now=0.0):
        for value in values:
            data = value if isinstance(value, bytes) else codec.encode(value)
            key = getattr(value, "rollout_id", RID)
            record = LogRecord(EVENTS, self.offset, 0, key, data)
            self.offset += 1
            self.fold.apply(record, now)
        return self

    def end(self):
        return self.fold.decided[RID].end


@pytest.fixture
def feed():
    return Feeder()


def test_success_ends_with_triplets_and_the_total_reward(feed):
    feed(
        event(TASK, "a", "preparing"),
        event(TASK, "a", "running"),
        call(TASK, "a", "1"),
        reward(TASK, "a", 0.5),
        event(TASK, "a", "succeeded", span_counts={"agent": 1, "proxy": 1}),
    )
    decision = feed.fold.decided[RID]
    assert decision.end.status == "succeeded"
    assert (decision.end.reward, decision.end.turns, decision.end.spans) == (0.5, 1, 2)
    assert (decision.end.model_version, decision.end.trainable, decision.end.attempt_id) == ("run.0.1", True, "a")
    assert [t.reward for t in decision.triplets] == [0.5]


def test_a_missing_span_makes_the_attempt_untrainable_and_says_so(feed):
    feed(
        event(TASK, "a", "preparing"),
        call(TASK, "a", "1"),
        event(TASK, "a", "succeeded", span_counts={"agent": 1, "proxy": 1}),
    )
    decision = feed.fold.decided[RID]
    assert not decision.end.trainable
    assert not decision.triplets[0].trainable
    assert "the attempt wrote {'agent': 1, 'proxy': 1}, the log holds {'proxy': 1}" in decision.end.reason


@pytest.mark.parametrize(
    ("status", "outcome", "losses"),
    [("failed", "failed", 0), ("timeout", "failed", 0), ("lost", "failed", 1), ("cancelled", "cancelled", 0)],
)
def test_other_ends(feed, status, outcome, losses):
    feed(event(TASK, "a", "preparing"), event(TASK, "a", status))
    assert (feed.end().status, feed.end().losses, feed.end().trainable) == (outcome, losses, False)
    assert feed.end().reason.startswith(f"{status}: ")


def test_the_first_terminal_status_is_final(feed):
    feed(event(TASK, "a", "preparing"), event(TASK, "a", "failed"), event(TASK, "a", "succeeded"))
    assert feed.end().status == "failed"
    assert feed.fold.ignored["late_event"] == 1


def test_a_lease_that_runs_out_ends_the_rollout(feed):
    feed(event(TASK, "a", "preparing", lease_s=10.0), now=100.0)
    feed.fold.expire(now=110.0, not_before=0.0, time_ns=1)
    assert RID not in feed.fold.decided
    feed.fold.expire(now=110.1, not_before=0.0, time_ns=1)
    assert feed.end().reason == "lost: no heartbeat for 10 s"


def test_a_heartbeat_renews_the_lease(feed):
    feed(event(TASK, "a", "preparing"), now=100.0)
    feed(event(TASK, "a", "running"), now=109.0)
    feed.fold.expire(now=118.0, not_before=0.0, time_ns=1)
    assert RID not in feed.fold.decided


def test_nobody_expires_for_a_silence_that_was_the_logs(feed):
    feed(event(TASK, "a", "preparing"), now=100.0)
    feed.fold.expire(now=200.0, not_before=195.0, time_ns=1)
    assert RID not in feed.fold.decided


def test_a_zombies_claim_does_not_end_the_rollout_that_another_runner_works_on(feed):
    """A runner whose commit failed has written `preparing` and runs nothing; the task's new owner claims it again."""
    feed(event(TASK, "zombie", "preparing"), now=0.0)
    feed(event(TASK, "b", "preparing"), now=8.0)
    feed.fold.expire(now=11.0, not_before=0.0, time_ns=1)
    assert RID not in feed.fold.decided
    feed(call(TASK, "b", "1"), event(TASK, "b", "succeeded", span_counts={"proxy": 1}), now=12.0)
    assert (feed.end().status, feed.end().attempt_id) == ("succeeded", "b")


def test_only_the_chosen_attempts_spans_are_used(feed):
    feed(event(TASK, "a", "preparing"), call(TASK, "a", "1"), event(TASK, "b", "preparing"), call(TASK, "b", "2"))
    feed(event(TASK, "b", "succeeded", span_counts={"proxy": 1}))
    assert [t.attempt_id for t in feed.fold.decided[RID].triplets] == ["b"]


def test_after_the_mark_everything_is_late(feed):
    feed(event(TASK, "a", "preparing"), event(TASK, "a", "failed"))
    feed(feed.end())
    feed(event(TASK, "b", "preparing"), span(TASK, "b"), event(TASK, "b", "succeeded"))
    assert feed.fold.decided == {}
    assert feed.fold.open == {}
    assert feed.fold.ignored == {"late_event": 2, "late_span": 1}


def test_marks_found_by_the_first_pass_keep_a_decision_from_being_made_again(feed):
    feed(event(TASK, "a", "preparing"), event(TASK, "a", "failed"))
    mark = LogRecord(EVENTS, 9, 0, RID, codec.encode(feed.end()))
    successor = Feeder()
    successor.fold.scan(mark)
    successor(event(TASK, "a", "preparing"), event(TASK, "a", "failed"))
    assert successor.fold.decided == {}


def test_garbage_is_refused_and_changes_nothing(feed):
    feed(event(TASK, "a", "preparing"))
    with pytest.raises(UnknownSchema):
        feed(b"garbage")
    with pytest.raises(CodecError, match="has no place among the events"):
        feed(task())
    with pytest.raises(CodecError, match="task"):
        feed(replace(event(task(), "x", "preparing"), task=None))
    feed(event(TASK, "a", "succeeded"))
    assert feed.end().status == "succeeded"


def test_a_broken_span_of_an_open_rollout_is_kept_for_the_dead_letter_topic(feed):
    feed(event(TASK, "a", "preparing"), codec.encode(span(TASK, "a"))[:-3])
    feed(event(TASK, "a", "succeeded", span_counts={"agent": 1}))
    ((record, error),) = feed.fold.decided[RID].unreadable
    assert record.offset == 1
    assert "Span" in error
    assert not feed.end().trainable


def test_a_broken_span_of_no_rollout_is_refused(feed):
    with pytest.raises(CodecError, match="Span"):
        feed(codec.encode(span(task(), "a"))[:-3])


def test_an_adapter_that_raises_still_ends_the_rollout():
    def broken(trace):
        raise KeyError("oops")

    feed = Feeder(broken)
    feed(event(TASK, "a", "preparing"), event(TASK, "a", "succeeded"))
    assert (feed.end().status, feed.end().trainable) == ("succeeded", False)
    assert feed.end().reason == "the adapter's function failed: KeyError: 'oops'"


def test_the_oldest_open_rollout_holds_the_offset_back(feed):
    other = task()
    feed(event(TASK, "a", "preparing"), event(other, "b", "preparing"))
    assert feed.fold.oldest_open(set()) == 0
    assert feed.fold.oldest_open({RID}) == 1
    assert feed.fold.oldest_open({RID, other.rollout_id}) is None
