"""The adapter's decisions: how a rollout ends, for each history of its events."""

from collections import Counter
from dataclasses import replace

import pytest
from factories import call, event, reward, span, task

from millstream.consumers.adapter.settle import FoldPolicy, PartitionFold
from millstream.consumers.adapter.triplets import to_triplets
from millstream.schemas.errors import CodecError, UnknownSchema
from millstream.schemas.ids import id_time_ms
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import Settled
from millstream.schemas.wire.settled import packed

EVENTS = Partition("millstream.events", 0)
TASK = task()
RID = TASK.rollout_id


class Feeder:
    """A partition fed record by record, encoded as on Kafka."""

    def __init__(self, adapter=to_triplets, random=lambda: 1.0, **policy):
        self.late = Counter()
        on_late = lambda kind: self.late.update([kind])  # noqa: E731
        self.fold = PartitionFold(adapter, FoldPolicy(**policy), random=random, on_late=on_late)
        self.offset = 0

    def __call__(self, *values, now=0.0):
        for value in values:
            data = value if isinstance(value, bytes) else codec.encode(value)
            key = getattr(value, "rollout_id", RID)
            record = LogRecord(EVENTS, self.offset, 0, key, data)
            self.offset += 1
            self.fold.apply(record, now)
        return self

    def successor(self, *decisions):
        """A feeder that knows that these have been written."""
        successor = Feeder()
        for decision in decisions:
            successor.fold.load(Settled(marks=packed(decision.marks)), 0, 0)
        return successor

    def end(self):
        return self.fold.decided[RID].end

    def retry(self):
        """Writes the retry that has been decided, as the adapter does; the next attempt's task."""
        retry = self.fold.decided[RID].retry
        self.fold.written(RID)
        self(retry.mark)
        return retry.task


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


def test_exported_spans_are_not_counted_and_one_that_was_sent_twice_is_used_once(feed):
    exported = replace(reward(TASK, "a", 0.5), source="otlp")
    feed(
        event(TASK, "a", "preparing"),
        call(TASK, "a", "1"),
        exported,
        exported,
        event(TASK, "a", "succeeded", span_counts={"proxy": 1}),
    )
    decision = feed.fold.decided[RID]
    assert (decision.end.reward, decision.end.spans, decision.end.reason) == (0.5, 2, None)
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
    ("status", "outcome", "lost_attempts"),
    [("failed", "failed", 0), ("timeout", "failed", 0), ("lost", "failed", 1), ("cancelled", "cancelled", 0)],
)
def test_other_ends(feed, status, outcome, lost_attempts):
    feed(event(TASK, "a", "preparing"), event(TASK, "a", status))
    assert (feed.end().status, feed.end().lost_attempts, feed.end().trainable) == (outcome, lost_attempts, False)
    assert feed.end().reason.startswith(f"{status}: ")


def test_the_first_terminal_status_is_final(feed):
    feed(event(TASK, "a", "preparing"), event(TASK, "a", "failed"), event(TASK, "a", "succeeded"))
    assert feed.end().status == "failed"
    assert feed.late["late_event"] == 1


def test_an_expired_lease_ends_the_rollout(feed):
    feed(event(TASK, "a", "preparing"), event(TASK, "a", "running", lease_s=10.0), now=100.0)
    feed.fold.expire(now=110.0, not_before=0.0, time_ns=1)
    assert RID not in feed.fold.decided
    feed.fold.expire(now=110.1, not_before=0.0, time_ns=1)
    assert feed.end().reason == "lost: no heartbeat for 10 s"


def test_a_claim_that_never_ran_is_given_up_later_than_its_task_is_delivered_again(feed):
    feed(event(TASK, "a", "preparing", lease_s=10.0), now=100.0)
    feed.fold.expire(now=130.0, not_before=0.0, time_ns=1)
    assert RID not in feed.fold.decided
    feed.fold.expire(now=130.1, not_before=0.0, time_ns=1)
    assert feed.end().reason == "lost: no heartbeat for 30 s"


def test_a_heartbeat_renews_the_lease(feed):
    feed(event(TASK, "a", "preparing"), now=100.0)
    feed(event(TASK, "a", "running"), now=109.0)
    feed.fold.expire(now=118.0, not_before=0.0, time_ns=1)
    assert RID not in feed.fold.decided


def test_no_lease_expires_while_the_log_was_silent(feed):
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
    assert feed.late == {"late_event": 2, "late_span": 1, "zombie_result": 1}


def test_what_a_predecessor_has_settled_is_not_decided_again(feed):
    feed(event(TASK, "a", "preparing"), event(TASK, "a", "failed"))
    successor = feed.successor(feed.fold.decided[RID])
    successor(event(TASK, "a", "preparing"), event(TASK, "a", "failed"))
    assert successor.fold.decided == {}


def test_garbage_is_refused_and_changes_nothing(feed):
    feed(event(TASK, "a", "preparing"))
    with pytest.raises(UnknownSchema):
        feed(b"garbage")
    with pytest.raises(CodecError, match="does not belong among events"):
        feed(task())
    with pytest.raises(CodecError, match="task"):
        feed(replace(event(task(), "x", "preparing"), task=None))
    with pytest.raises(CodecError, match="another rollout"):
        feed(replace(event(task(), "x", "preparing"), task=codec.encode(task())))
    feed(event(TASK, "a", "succeeded"))
    assert feed.end().status == "succeeded"


def test_a_broken_span_of_an_open_rollout_is_kept_for_the_dead_letter_topic(feed):
    feed(event(TASK, "a", "preparing"), codec.encode(span(TASK, "a"))[:-3])
    feed(event(TASK, "a", "succeeded", span_counts={"agent": 1}))
    ((record, reason, error),) = feed.fold.decided[RID].dead
    assert (record.offset, reason) == (1, "undecodable")
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


# --- another attempt


def test_a_failed_attempt_is_retried_after_its_backoff_from_its_state(feed):
    of = replace(TASK, max_attempts=3, seed=7)
    feed(event(of, "a", "preparing"), event(of, "a", "running", state=b"step 1"), event(of, "a", "failed"), now=100.0)
    decision = feed.fold.decided[RID]
    assert decision.retry.task == replace(of, attempt=2, state=b"step 1")
    assert (decision.retry.mark.status, decision.retry.mark.attempt_id, decision.retry.mark.attempt) == (
        "retry",
        "a",
        1,
    )
    assert list(feed.fold.ready(now=100.9)) == []
    assert list(feed.fold.ready(now=101.0)) == [(RID, decision)]
    assert feed.fold.oldest_open(set()) == 0  # a successor has to decide it again


def test_attempts_that_fail_end_the_rollout_once_there_are_no_more(feed):
    of = replace(TASK, max_attempts=2)
    feed(event(of, "a", "preparing"), event(of, "a", "timeout"))
    of = feed.retry()
    assert feed.fold.open == {}  # it waits in tasks, and holds no offset back
    feed(event(of, "b", "preparing"), event(of, "b", "failed", state=b"s"))
    assert (feed.end().status, feed.end().attempts, feed.end().attempt_id) == ("failed", 2, "b")
    ((record, reason, error),) = feed.fold.decided[RID].dead
    assert (reason, error) == ("attempts_exhausted", feed.end().reason)
    assert record.value == replace(of, state=b"s")
    assert record.offset == 3  # the claim's


def test_lost_attempts_have_their_own_budget(feed):
    of = replace(TASK, max_attempts=2, max_lost_attempts=2)
    for how in ("lost", "failed", "lost"):
        feed(event(of, how + str(of.attempt), "preparing"), event(of, how + str(of.attempt), how))
        of = feed.retry()
    assert (of.attempt, of.lost_attempts) == (4, 2)
    feed(event(of, "d", "preparing"), event(of, "d", "lost"))
    assert (feed.end().status, feed.end().attempts, feed.end().lost_attempts) == ("failed", 4, 3)
    assert feed.fold.decided[RID].dead[0][1] == "lost_attempts_exhausted"


@pytest.mark.parametrize(("how", "again"), [("failed", False), ("timeout", True), ("unresponsive", False)])
def test_retry_on_says_what_is_retried(feed, how, again):
    of = replace(TASK, max_attempts=5, retry_on=("timeout",))
    feed(event(of, "a", "preparing"), event(of, "a", how))
    decision = feed.fold.decided[RID]
    assert (decision.retry is not None) == again
    assert again or decision.dead[0][1] == "not_retried"


def test_cancelled_attempts_are_not_retried(feed):
    of = replace(TASK, max_attempts=5, max_lost_attempts=5, retry_on=("cancelled",))
    feed(event(of, "a", "preparing"), event(of, "a", "cancelled"))
    assert (feed.end().status, feed.fold.decided[RID].retry, feed.fold.decided[RID].dead) == ("cancelled", None, ())


def test_a_lost_attempts_late_success_is_ignored_and_counted(feed):
    of = replace(TASK, max_lost_attempts=1)
    feed(event(of, "a", "preparing"))
    feed.fold.expire(now=100.0, not_before=0.0, time_ns=1)
    late = (span(of, "a"), event(of, "a", "succeeded", span_counts={"agent": 1}))
    feed(*late)  # before the retry is written,
    second = feed.retry()
    feed(*late)  # while it waits in tasks,
    feed(event(second, "b", "preparing"), *late)  # and while it runs
    assert RID not in feed.fold.decided
    feed(call(of, "b", "1"), event(second, "b", "succeeded", span_counts={"proxy": 1}))
    assert (feed.end().attempt_id, feed.end().attempts, feed.end().lost_attempts, feed.end().trainable) == (
        "b",
        2,
        1,
        True,
    )
    feed(feed.end(), *late)
    assert feed.late["zombie_result"] == 4


def test_reading_the_deciding_success_again_counts_no_zombie(feed):
    feed(event(TASK, "a", "preparing"), event(TASK, "a", "succeeded"))
    successor = feed.successor(feed.fold.decided[RID])
    successor(event(TASK, "a", "preparing"), event(TASK, "a", "succeeded"))
    assert successor.late == {"late_event": 2}


def test_a_predecessors_retry_is_not_decided_again(feed):
    of = replace(TASK, max_attempts=3)
    first = (event(of, "a", "preparing"), event(of, "a", "failed"))
    feed(*first)
    retry = feed.fold.decided[RID].retry
    successor = feed.successor(feed.fold.decided[RID])
    successor(*first, retry.mark, event(of, "again", "preparing"))  # the first task was delivered twice
    assert (successor.fold.decided, successor.fold.open) == ({}, {})
    successor(event(retry.task, "b", "preparing"))
    assert successor.fold.oldest_open(set()) == 4


def test_a_predecessors_retries_are_all_known_whatever_is_read_again(feed):
    of = replace(TASK, max_attempts=5)
    feed(event(of, "a", "preparing"), event(of, "a", "failed"))
    first = feed.fold.decided[RID]
    second = feed.retry()
    feed(event(second, "b", "preparing"), event(second, "b", "failed"))
    successor = feed.successor(first, feed.fold.decided[RID])
    successor(event(of, "a", "preparing"), event(of, "a", "failed"), first.retry.mark)
    successor(
        event(second, "b", "preparing"), event(second, "b", "failed")
    )  # the last mark has not been read again yet
    assert (successor.fold.decided, successor.fold.open) == ({}, {})


def test_a_task_delivered_again_during_the_backoff_is_enough(feed):
    """Its first claimer died before it committed; the second has the task already."""
    of = replace(TASK, max_lost_attempts=3)
    feed(event(of, "a", "preparing"))
    feed.fold.expire(now=100.0, not_before=0.0, time_ns=1)
    feed(event(of, "b", "preparing"), event(of, "b", "succeeded"), now=100.0)
    assert (feed.end().status, feed.end().attempt_id, feed.end().lost_attempts) == ("succeeded", "b", 0)
    assert feed.fold.decided[RID].retry is None


def test_a_next_attempt_that_cannot_be_published_ends_the_rollout(feed):
    of = replace(TASK, max_attempts=3)
    feed(event(of, "a", "preparing"), event(of, "a", "failed"))
    assert feed.fold.unwritable(RID, "too_large: 17 MB")
    decision = feed.fold.decided[RID]
    assert (decision.retry, decision.end.status, decision.end.reason) == (None, "failed", "too_large: 17 MB")
    assert decision.dead[0][1] == "too_large"


@pytest.mark.parametrize("live", [False, True])
def test_an_attempt_with_too_many_spans_fails_and_frees_its_memory(live):
    feed = Feeder(attempt_bytes=10_000)
    feed(event(TASK, "a", "preparing"))
    for n in range(40):
        one = span(TASK, "a", attributes={"x": "y" * 1000})
        feed.fold.apply(LogRecord(EVENTS, 1 + n, 0, RID, one if live else codec.encode(one)), 0.0)
        assert feed.fold.size <= 12_000
    feed(event(TASK, "a", "succeeded"))
    assert (feed.end().status, feed.end().reason) == (
        "failed",
        "failed: too_large: the adapter keeps at most 10,000 bytes of an attempt",
    )
    assert feed.fold.size == 0


def test_memory_is_accounted_for_to_the_end(feed):
    of = replace(TASK, max_attempts=2)
    feed(event(of, "a", "preparing"), call(of, "a", "1"), event(of, "a", "running", state=b"x" * 100))
    size = feed.fold.size
    feed(event(of, "a", "running", state=b"x" * 150))
    assert feed.fold.size == size + 50
    assert feed.fold.largest() == (size + 50, RID)
    feed(event(of, "a", "failed"))
    feed(event(feed.retry(), "b", "preparing"), call(of, "b", "1"))
    feed(replace(_ended(of), status="cancelled"))
    assert (feed.fold.size, feed.fold.open) == (0, {})


def _ended(of):
    other = Feeder()
    other(event(of, "z", "preparing"), event(of, "z", "succeeded"))
    return other.end()


def test_a_hook_decides_whether_a_failure_is_retried(feed):
    of = task(rollout_id=RID, max_attempts=3)
    feed(event(of, "a", "preparing"), event(of, "a", "failed", metadata={"retry": "no"}))
    assert feed.fold.decided[RID].retry is None


# --- what comes back


DAY_MS = 24 * 3600 * 1000


@pytest.mark.parametrize("days", [0, 0.005, 1, 6, 13])
@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled"])
def test_a_claim_that_comes_back_after_any_time_ends_no_rollout_twice(feed, days, restarted, outcome):
    """Entry C1: a late commit, a frozen runner, a rebalance, or a publisher that repeats an id."""
    of = task()
    feed(event(of, "a", "preparing"), event(of, "a", outcome))
    decision = feed.fold.decided[of.rollout_id]
    feed.fold.written(of.rollout_id)
    if restarted:
        feed = feed.successor(decision)
    late_ms = int(id_time_ms(of.rollout_id) + days * DAY_MS)
    for value in (event(of, "b", "preparing"), event(of, "b", "running"), event(of, "b", "succeeded")):
        feed.fold.apply(LogRecord(EVENTS, 10, late_ms, of.rollout_id, codec.encode(value)), days * 86_400)
    feed.fold.expire(days * 86_400 + 1e6, 0.0, 1)
    assert (feed.fold.open, feed.fold.decided) == ({}, {})


def test_a_claim_of_a_rollout_older_than_what_is_known_is_late(feed):
    """Entry C1: its end may have been forgotten; its task was ended long before."""
    of = task()
    for days, is_open in ((13, True), (15, False)):
        feed = Feeder()
        claim = codec.encode(event(of, "a", "preparing"))
        feed.fold.apply(LogRecord(EVENTS, 0, id_time_ms(of.rollout_id) + days * DAY_MS, RID, claim), 0.0)
        assert (of.rollout_id in feed.fold.open) is is_open


def test_an_attempt_that_was_retried_does_not_come_back_while_its_successor_waits(feed):
    """Entry C1: attempt 2 waits in tasks for hours; the task of attempt 1 is delivered again."""
    of = replace(TASK, max_attempts=3)
    feed(event(of, "a", "preparing"), event(of, "a", "failed"))
    second = feed.retry()
    feed(event(of, "late", "preparing"), event(of, "late", "succeeded"), now=1e5)
    assert (feed.fold.open, feed.fold.decided) == ({}, {})
    feed(event(second, "b", "preparing"), event(second, "b", "succeeded"), now=1e5)
    assert feed.end().attempt_id == "b"


@pytest.mark.parametrize("how", ["running", "succeeded", "failed", "lost", "cancelled", "unresponsive"])
def test_a_rollout_whose_claim_is_missing_ends_once(feed, how):
    """Entry C7: retention has deleted the claim, or it was undecodable (of a newer runner, for example)."""
    of = task()
    feed(span(of, "a"), event(of, "a", how), event(of, "a", "succeeded"))
    decision = feed.fold.decided[of.rollout_id]
    assert (decision.end.status, decision.end.trainable, decision.retry, decision.dead) == ("failed", False, None, ())
    assert decision.end.reason.startswith("no_claim: ")
    feed.fold.written(of.rollout_id)
    feed(decision.end, event(of, "a", how), event(of, "b", "preparing"), event(of, "b", "succeeded"))
    assert (feed.fold.open, feed.fold.decided, feed.fold.size) == ({}, {}, 0)


def test_an_event_of_a_retried_attempt_does_not_end_the_rollout_that_waits(feed):
    of = replace(TASK, max_attempts=3)
    feed(event(of, "a", "preparing"), event(of, "a", "failed"))
    feed.retry()
    feed(event(of, "a", "running"), event(of, "other claim", "succeeded"))
    assert (feed.fold.open, feed.fold.decided) == ({}, {})
