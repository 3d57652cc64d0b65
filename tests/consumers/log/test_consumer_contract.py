"""The promises of `consumers.port`, on every log, for both kinds of consumer."""

import asyncio
import time
from collections.abc import Callable

import pytest
from contract_helpers import (
    CALL_S,
    DEADLINE_S,
    PARTITIONS,
    SEVERAL_MEMBERS,
    LogUnderTest,
    Member,
    name_of,
    names,
    note,
    poll_until,
    read,
    read_ends,
    read_nothing,
)

from millstream.producers.log.acks import send_acknowledged
from millstream.producers.log.port import Producer
from millstream.schemas.errors import TransactionAborted
from millstream.schemas.wire.log import EndOfPartition, LogRecord, Partition

NewMember = Callable[[], Member]


def events(log: LogUnderTest) -> list[Partition]:
    return [Partition(log.topics.events, n) for n in range(PARTITIONS)]


def send(log: LogUnderTest, producer: Producer, *found: str, topic: str | None = None) -> None:
    """Names spread over the partitions in turn."""
    for n, name in enumerate(found):
        producer.send(topic or log.topics.events, note(name), partition=n % PARTITIONS)
    producer.flush(CALL_S)


@SEVERAL_MEMBERS
async def test_a_group_shares_the_partitions_and_loses_nothing_when_members_come_and_go(
    log: LogUnderTest, new_member: NewMember
) -> None:
    producer = log.producer()
    sent: set[str] = set()

    def send_more(batch: str) -> None:
        more = [f"{batch}/{n}" for n in range(40)]
        sent.update(more)
        send(log, producer, *more)

    send_more("alone")
    one = await new_member().join(log.topics.events)
    await poll_until("one owns everything", lambda: one.owned == set(events(log)), one)
    two = await new_member().join(log.topics.events)
    send_more("joining")
    await poll_until("two owns its half", lambda: len(two.owned) == len(one.owned) == PARTITIONS // 2, one, two)
    assert one.owned | two.owned == set(events(log))
    send_more("together")
    everything = lambda: set(names(one.records)) | set(names(two.records)) >= sent  # noqa: E731
    await poll_until("everything was handed out", everything, one, two)

    await one.consumer.close()
    assert one.owned == set()
    send_more("left")
    await poll_until("two owns everything", lambda: two.owned == set(events(log)), two)
    await poll_until("everything was handed out", everything, two)
    # There were no commits: a new owner of a partition starts at its beginning and skips nothing.
    got_from_one = [p for p in events(log) if p in one.revoked]
    assert {r.offset for r in two.records if r.partition == got_from_one[0]} == set(range(40))
    assert one._ownership.violations == []


async def test_a_group_goes_on_at_its_committed_offsets(log: LogUnderTest) -> None:
    first, second, *rest = events(log)
    producer = log.producer()
    for n in range(5):
        producer.send(log.topics.events, note(f"first/{n}"), partition=0)
        producer.send(log.topics.events, note(f"second/{n}"), partition=1)
    producer.flush(CALL_S)
    member = await Member(log.consumer("team")).join(log.topics.events)
    await poll_until("has read", lambda: len(member.records) == 10, member)
    assert member.consumer.assignment() == member.owned
    assert await member.consumer.committed([first, second]) == {first: None, second: None}
    await member.consumer.commit({first: 3})
    assert await member.consumer.committed([first, second]) == {first: 3, second: None}
    await member.consumer.close()

    successor = await Member(log.consumer("team")).join(log.topics.events)
    await poll_until("has read the rest", lambda: len(successor.records) >= 7, successor)
    await read_nothing(log, successor.consumer)
    assert sorted(names(successor.records)) == ["first/3", "first/4", *(f"second/{n}" for n in range(5))]
    assert successor.consumer.position(first) == 5
    assert all(successor.consumer.position(p) == 0 for p in rest)


@SEVERAL_MEMBERS
async def test_a_lost_partition_can_not_be_committed(log: LogUnderTest) -> None:
    send(log, log.producer(), *map(str, range(PARTITIONS)))
    one = await Member(log.consumer("team")).join(log.topics.events)
    await poll_until("one has read everything", lambda: len(one.records) == PARTITIONS, one)
    two = await Member(log.consumer("team")).join(log.topics.events)
    await poll_until("two has read its half", lambda: len(two.records) == PARTITIONS // 2, one, two)
    lost, kept = min(two.owned), min(one.owned)
    await poll_until("one has read its half again", lambda: one.consumer.holds(kept, 0), one, two)
    with pytest.raises(TransactionAborted):
        await one.consumer.commit({lost: 1})
    await one.consumer.commit({kept: 1})
    assert await two.consumer.committed([lost, kept]) == {lost: None, kept: 1}


@SEVERAL_MEMBERS
async def test_what_was_read_before_a_rebalance_is_not_committed_when_the_partition_comes_back(
    log: LogUnderTest,
) -> None:
    """The brokers would take it: the offset of a member that stood still would put another's later one back."""
    send(log, log.producer(), *map(str, range(2 * PARTITIONS)))
    one = await Member(log.consumer("team")).join(log.topics.events)
    await poll_until("one has read everything", lambda: len(one.records) == 2 * PARTITIONS, one)
    two = await Member(log.consumer("team")).join(log.topics.events)
    await poll_until("two has read its half", lambda: len(two.records) == PARTITIONS, one, two)
    lent = min(two.owned)
    await two.consumer.commit(dict.fromkeys(two.owned, 2))
    await two.consumer.close()
    await poll_until("one has everything again", lambda: one.owned == set(events(log)), one)
    assert not one.consumer.holds(lent, 0)
    with pytest.raises(TransactionAborted, match="went to another member after these records were read"):
        await one.consumer.commit({lent: 1})
    assert await one.consumer.committed([lent]) == {lent: 2}


async def test_assign_begins_at_the_beginning_or_at_the_end(log: LogUnderTest) -> None:
    producer = log.producer()
    send(log, producer, *(f"old/{n}" for n in range(PARTITIONS)))
    whole, tail = log.consumer(), log.consumer()
    await whole.assign(events(log))
    await tail.assign(events(log), "end")
    assert whole.assignment() == frozenset(events(log))
    await read_nothing(log, tail)
    send(log, producer, "new")
    assert names(await read(tail, 1)) == ["new"]
    assert len(await read(whole, PARTITIONS + 1)) == PARTITIONS + 1


async def test_seek_moves_the_position(log: LogUnderTest) -> None:
    producer = log.producer()
    for n in range(10):
        producer.send(log.topics.events, note(str(n)), partition=2)
    producer.flush(CALL_S)
    partition = Partition(log.topics.events, 2)
    consumer = log.consumer()
    await consumer.assign([partition])
    assert names(await read(consumer, 6)) == [str(n) for n in range(6)]
    assert consumer.position(partition) == 6
    await consumer.seek(partition, 2)
    assert names(await read(consumer, 3)) == ["2", "3", "4"]
    await consumer.seek(partition, 9)
    assert names(await read(consumer, 1)) == ["9"]
    assert consumer.position(partition) == 10
    assert consumer.position(Partition(log.topics.events, 3)) is None


async def test_ends_and_beginnings(log: LogUnderTest) -> None:
    send(log, log.producer(), *map(str, range(PARTITIONS + 1)))
    consumer = log.consumer()
    await consumer.assign(events(log))
    ends = await consumer.end_offsets(events(log))
    assert ends == {p: 2 if p.number == 0 else 1 for p in events(log)}
    assert await consumer.beginning_offsets(events(log)) == dict.fromkeys(events(log), 0)
    await read(consumer, PARTITIONS + 1)
    assert {p: consumer.position(p) for p in events(log)} == ends


async def test_offsets_since_a_time(log: LogUnderTest) -> None:
    producer = log.producer()
    partition, empty = events(log)[:2]
    await send_acknowledged(producer, log.topics.events, note("old"), partition=0)
    later_ms = time.time_ns() // 1_000_000 + 1
    while time.time_ns() // 1_000_000 < later_ms:  # at most a millisecond
        pass
    await send_acknowledged(producer, log.topics.events, note("new"), partition=0)
    consumer = log.consumer()
    assert await consumer.offsets_since([partition, empty], 1) == {partition: 0, empty: 0}
    assert await consumer.offsets_since([partition, empty], later_ms) == {partition: 1, empty: 0}
    assert await consumer.offsets_since([partition], later_ms + 3_600_000) == {partition: 2}


async def test_a_paused_partition_holds_its_records_back(log: LogUnderTest) -> None:
    producer = log.producer()
    paused, *others = events(log)
    consumer = log.consumer()
    await consumer.assign(events(log))
    consumer.pause([paused])
    send(log, producer, *map(str, range(2 * PARTITIONS)))
    found = await read(consumer, 2 * len(others))
    await read_nothing(log, consumer)
    assert {r.partition for r in found} == set(others)
    consumer.resume([paused])
    assert names(await read(consumer, 2)) == ["0", str(PARTITIONS)]


async def test_poll_may_be_restricted_to_topics(log: LogUnderTest) -> None:
    high, low = log.topics.tasks("high"), log.topics.tasks("low")
    producer = log.producer()
    send(log, producer, *(f"low/{n}" for n in range(8)), topic=low)
    send(log, producer, *(f"high/{n}" for n in range(8)), topic=high)
    consumer = log.consumer("team")
    await consumer.subscribe([high, low])
    assert sorted(names(await read(consumer, 8, [high]))) == [f"high/{n}" for n in range(8)]
    await read_nothing(log, consumer, [high])
    some_low = names(await read(consumer, 3, [low]))
    send(log, producer, "high/8", topic=high)
    rest = names(await read(consumer, 6))  # what a restricted call left is neither lost nor repeated
    assert sorted(some_low + rest) == sorted(["high/8", *(f"low/{n}" for n in range(8))])


async def test_poll_wakes_when_a_record_comes(log: LogUnderTest, new_member: NewMember) -> None:
    producer = log.producer()
    member = await new_member().join(log.topics.events)
    send(log, producer, "warm up")
    await poll_until("has read", lambda: member.records, member)

    async def poll() -> list[LogRecord]:
        found: list[LogRecord] = []
        while not found:  # a transactional consumer reports ends meanwhile
            found = await member.poll(10 * DEADLINE_S)
        return found

    polling = asyncio.create_task(poll())
    await asyncio.sleep(log.quiet_s)
    assert not polling.done()
    await asyncio.to_thread(send, log, producer, "wake up")
    assert names(await asyncio.wait_for(polling, DEADLINE_S)) == ["wake up"]


async def test_poll_returns_empty_at_its_deadline(log: LogUnderTest) -> None:
    consumer = log.consumer()
    await consumer.assign(events(log))
    send(log, log.producer(), "warm up")
    await read(consumer, 1)
    began = time.monotonic()
    assert await asyncio.wait_for(consumer.poll(100, 0.3), DEADLINE_S) == []
    assert time.monotonic() - began > 0.25


async def test_poll_hands_out_no_more_than_was_asked_for(log: LogUnderTest, new_member: NewMember) -> None:
    send(log, log.producer(), *map(str, range(20)))
    consumer = (await new_member().join(log.topics.events)).consumer
    found: list[str] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < 20 and time.monotonic() < deadline:
        batch = await consumer.poll(3, 0.5)
        assert len(batch) <= 3
        found += [name_of(item) for item in batch if isinstance(item, LogRecord)]
    assert sorted(found, key=int) == list(map(str, range(20)))


async def test_an_end_is_reported_whenever_it_is_reached(log: LogUnderTest) -> None:
    producer = log.producer()
    first, second, *rest = events(log)
    send(log, producer, "0", "1")
    consumer = log.transactional_consumer("team")
    await consumer.subscribe([log.topics.events])
    records, ends = await read_ends(consumer, PARTITIONS)
    assert sorted(names(records)) == ["0", "1"]
    expected = {EndOfPartition(first, 1), EndOfPartition(second, 1), *(EndOfPartition(p, 0) for p in rest)}
    assert set(ends) == expected
    assert await consumer.poll(100, 0.5) == []  # once
    send(log, producer, "2")
    records, ends = await read_ends(consumer, 1)
    assert names(records) == ["2"]
    assert ends == [EndOfPartition(first, 2)]
    await consumer.seek(second, 0)
    records, ends = await read_ends(consumer, 1)
    assert names(records) == ["1"]
    assert ends == [EndOfPartition(second, 1)]


async def test_positions_pass_aborted_records(log: LogUnderTest, new_member: NewMember) -> None:
    """A reader behind aborted records misses nothing and sees nothing twice."""
    producer = log.transactional_producer()
    partition = Partition(log.topics.events, 0)
    member = await new_member().join(log.topics.events)
    for n in range(6):
        producer.begin_transaction()
        producer.send(log.topics.events, note(f"{n}"), partition=0)
        producer.flush(CALL_S)
        if n % 2:
            producer.abort_transaction(CALL_S)
        else:
            producer.commit_transaction(CALL_S)
            await poll_until("has read", lambda n=n: len(member.records) == n // 2 + 1, member)
    assert await member.poll(log.quiet_s) == []
    assert names(member.records) == ["0", "2", "4"]
    ends = await member.consumer.end_offsets([partition])
    reported = [end.offset for end in member.ends if end.partition == partition]
    assert 5 <= (reported[-1] if reported else member.consumer.position(partition)) <= ends[partition]


async def test_listeners_get_partitions_before_their_records_and_are_called_at_their_loss(
    log: LogUnderTest, new_member: NewMember
) -> None:
    producer = log.producer()
    member = await new_member().join(log.topics.control)
    await poll_until("assigned", lambda: member.owned, member)
    partition = Partition(log.topics.control, 0)
    assert member.owned == {partition}
    await send_acknowledged(producer, log.topics.control, note("x"), key="note/x")
    await poll_until("read", lambda: member.records, member)
    await member.consumer.close()
    assert partition in member.revoked
    assert member.owned == set()
    assert member._ownership.violations == []


@SEVERAL_MEMBERS
async def test_a_member_without_partitions_gets_an_empty_assignment(log: LogUnderTest, new_member: NewMember) -> None:
    one = await new_member().join(log.topics.control)
    await poll_until("one owns it", lambda: one.owned, one)
    two = await new_member().join(log.topics.control)
    await poll_until("two has an assignment", lambda: two.assignments, one, two)
    assert len(one.owned) + len(two.owned) == 1


@pytest.mark.parametrize("kind", ["plain", "transactional"])
async def test_a_log_knows_when_its_open_consumers_polled(log: LogUnderTest, kind: str) -> None:
    consumer = log.consumer("team") if kind == "plain" else log.transactional_consumer("team")
    (times,) = log.log.polls()
    assert times is consumer.polls
    assert (times.last_poll, times.polling_since) == (None, None)
    await consumer.subscribe([log.topics.events])
    before = time.monotonic()
    poll = asyncio.create_task(consumer.poll(1, 0.05))
    await asyncio.sleep(0)
    assert times.polling_since is not None
    await poll
    assert times.last_poll is not None
    assert before <= times.last_poll <= time.monotonic()
    assert times.polling_since is None
    await consumer.close()
    assert log.log.polls() == []
