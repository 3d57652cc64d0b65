"""What the in-memory log promises beyond the contract that all logs share."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.consumers.log.memory_group import share
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Consumer
from millstream.schemas.errors import LogError, TransactionAborted
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import Control
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("m", 4)
EVENTS = TOPICS.events


class Clock:
    """Seconds that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Listener:
    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        self.calls.append(("assign", [p.number for p in partitions]))

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        self.calls.append(("revoke", [p.number for p in partitions]))


def note(name: str) -> Control:
    return Control(kind="note", name=name, body="", created_at=1)


async def poll(consumer: Consumer, max_records: int = 100, timeout_s: float = 0.0) -> list[str]:
    found = await consumer.poll(max_records, timeout_s)
    return [item.value.name for item in found if isinstance(item, LogRecord) and isinstance(item.value, Control)]


async def test_a_record_that_stays_in_the_process_is_the_object_itself() -> None:
    log = MemoryLog(TOPICS)
    sent = note("x")
    log.producer().send(EVENTS, sent, key="k")
    consumer = log.consumer()
    await consumer.assign([Partition(EVENTS, n) for n in range(4)])
    (record,) = await consumer.poll(10, 1.0)
    assert isinstance(record, LogRecord)
    assert record.value is sent


async def test_without_a_key_records_go_round() -> None:
    log = MemoryLog(TOPICS)
    producer = log.producer()
    for n in range(8):
        producer.send(EVENTS, note(str(n)))
    consumer = log.consumer()
    ends = await consumer.end_offsets([Partition(EVENTS, n) for n in range(4)])
    assert set(ends.values()) == {2}


async def test_a_full_partition_starves_no_other() -> None:
    log = MemoryLog(TOPICS)
    producer = log.producer()
    for n in range(3000):
        producer.send(EVENTS, note(f"many/{n}"), partition=n % 3)
    producer.send(EVENTS, note("rare"), partition=3)
    consumer = log.consumer()
    await consumer.assign([Partition(EVENTS, n) for n in range(4)])
    first_polls = [name for _ in range(4) for name in await poll(consumer, 10)]
    assert "rare" in first_polls
    assert len({int(name.split("/")[1]) % 3 for name in first_polls if name != "rare"}) == 3


async def test_polling_a_full_log_lets_other_tasks_run() -> None:
    log = MemoryLog(TOPICS)
    producer = log.producer()
    for n in range(100):
        producer.send(EVENTS, note(str(n)), partition=0)
    consumer = log.consumer()
    await consumer.assign([Partition(EVENTS, 0)])
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    for _ in range(100):
        await poll(consumer, 1)
    ticking.cancel()
    assert ticks >= 50


def test_loops_and_threads_wake_each_other() -> None:
    """Two event loops in two threads throw a record to and fro; each poll sleeps until the other's send."""
    log = MemoryLog(TOPICS)
    rounds = 200

    def play(mine: int, other: int, begins: bool) -> None:
        async def run() -> None:
            producer = log.producer()
            consumer = log.consumer()
            await consumer.assign([Partition(EVENTS, mine)])
            if begins:
                producer.send(EVENTS, note("0"), partition=other)
            for _ in range(rounds):
                assert len(await poll(consumer, 10, 10.0)) == 1
                producer.send(EVENTS, note("x"), partition=other)

        asyncio.run(run())

    began = time.monotonic()
    threads = [threading.Thread(target=play, args=(0, 1, True)), threading.Thread(target=play, args=(1, 0, False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - began < 8.0  # one missed wake-up alone would take ten
    assert not any(thread.is_alive() for thread in threads)


async def test_a_cancelled_poll_loses_nothing() -> None:
    log = MemoryLog(TOPICS)
    consumer = log.consumer("g")
    await consumer.subscribe([EVENTS])
    waiting = asyncio.create_task(poll(consumer, 10, 30.0))
    await asyncio.sleep(0.01)
    log.producer().send(EVENTS, note("x"), partition=0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await poll(consumer) == ["x"]


async def test_a_listener_may_send() -> None:
    log = MemoryLog(TOPICS)
    producer = log.producer()

    class Sender(Listener):
        def on_assign(self, partitions: Sequence[Partition]) -> None:
            producer.send(EVENTS, note("from on_assign"), partition=0)

    consumer = log.consumer("g")
    await consumer.subscribe([EVENTS], Sender())
    assert await poll(consumer, 10, 1.0) == ["from on_assign"]


async def test_a_member_that_stops_polling_is_evicted_and_told_so() -> None:
    clock = Clock()
    log = MemoryLog(TOPICS, clock=clock, session_timeout_s=10.0)
    heard = Listener()
    zombie, other = log.consumer("g"), log.consumer("g")
    await zombie.subscribe([EVENTS], heard)
    log.producer().send(EVENTS, note("x"), partition=0)
    assert await poll(zombie) == ["x"]
    await other.subscribe([EVENTS])
    assert await poll(other) == []
    clock.now = 9.0
    assert await poll(other) == []  # it may still be at work
    assert other.assignment() == frozenset()
    clock.now = 10.0
    assert await poll(other) == ["x"]
    assert len(other.assignment()) == 4
    with pytest.raises(TransactionAborted, match="no longer a member of group g"):
        await zombie.commit({Partition(EVENTS, 0): 1})
    await poll(zombie)
    assert heard.calls == [("assign", [0, 1, 2, 3]), ("revoke", [0, 1, 2, 3]), ("assign", [])]
    await poll(other)
    await poll(zombie)
    assert len(zombie.assignment()) == len(other.assignment()) == 2


async def test_a_waiting_poll_takes_over_from_a_dead_member_by_itself() -> None:
    log = MemoryLog(TOPICS, session_timeout_s=0.2)
    dead, alive = log.consumer("g"), log.consumer("g")
    await dead.subscribe([EVENTS])
    await poll(dead)
    await alive.subscribe([EVENTS])
    log.producer().send(EVENTS, note("x"), partition=0)
    began = time.monotonic()
    assert await poll(alive, 10, 20.0) == ["x"]
    assert 0.1 < time.monotonic() - began < 5.0


async def test_a_member_that_waits_in_poll_is_alive_however_long() -> None:
    clock = Clock()
    log = MemoryLog(TOPICS, clock=clock)
    patient, other = log.consumer("g"), log.consumer("g")
    await patient.subscribe([EVENTS])
    await poll(patient)
    waiting = asyncio.create_task(poll(patient, 10, 30.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    clock.now = 1000.0
    await other.subscribe([EVENTS])
    await poll(other)
    await asyncio.sleep(0.01)
    await poll(other)
    assert len(patient.assignment()) == len(other.assignment()) == 2
    log.producer().send(EVENTS, note("x"), partition=min(patient.assignment()).number)
    assert await waiting == ["x"]


async def test_metadata_from_before_an_eviction_is_worth_nothing_after_coming_back() -> None:
    clock = Clock()
    log = MemoryLog(TOPICS, clock=clock)
    zombie = log.consumer("g")
    await zombie.subscribe([EVENTS])
    await poll(zombie)
    stale = zombie.group_metadata()
    other = log.consumer("g")
    await other.subscribe([EVENTS])
    clock.now = 10.0
    await poll(other)
    await other.close()
    await poll(zombie)
    partition = Partition(EVENTS, 0)
    assert partition in zombie.assignment()  # it owns the partition again, but what it knew is old
    producer = log.transactional_producer("t")
    producer.init_transactions(1.0)
    producer.begin_transaction()
    with pytest.raises(TransactionAborted):
        producer.send_offsets({partition: 5}, stale, 1.0)
    with pytest.raises(TransactionAborted):  # until it is aborted
        producer.commit_transaction(1.0)
    producer.abort_transaction(1.0)
    producer.begin_transaction()
    producer.send_offsets({partition: 5}, zombie.group_metadata(), 1.0)
    producer.commit_transaction(1.0)
    assert await zombie.committed([partition]) == {partition: 5}


async def test_a_partition_lost_between_send_offsets_and_commit_aborts_the_whole_transaction() -> None:
    clock = Clock()
    log = MemoryLog(TOPICS, clock=clock)
    slow, other = log.consumer("g"), log.consumer("g")
    await slow.subscribe([EVENTS])
    await poll(slow)
    producer = log.transactional_producer("t")
    producer.init_transactions(1.0)
    producer.begin_transaction()
    producer.send(TOPICS.triplets, note("slow"), partition=0)
    producer.send_offsets({Partition(EVENTS, 0): 5}, slow.group_metadata(), 1.0)
    await other.subscribe([EVENTS])
    clock.now = 10.0
    await poll(other)
    with pytest.raises(TransactionAborted):
        producer.commit_transaction(1.0)
    producer.abort_transaction(1.0)
    assert await other.committed([Partition(EVENTS, 0)]) == {Partition(EVENTS, 0): None}
    reader = log.consumer()
    await reader.assign([Partition(TOPICS.triplets, 0)])
    assert await poll(reader) == []


async def test_a_producer_that_never_began_unfences_nobody() -> None:
    log = MemoryLog(TOPICS)
    first = log.transactional_producer("t")
    first.init_transactions(1.0)
    log.transactional_producer("t").close()
    log.transactional_producer("t").init_transactions(1.0)
    with pytest.raises(LogError, match="transactional id t"):
        first.begin_transaction()


async def test_an_open_transaction_holds_back_what_follows_it() -> None:
    log = MemoryLog(TOPICS)
    writer = log.transactional_producer("t")
    writer.init_transactions(1.0)
    reader = log.consumer()
    await reader.assign([Partition(EVENTS, 0)])
    writer.begin_transaction()
    writer.send(EVENTS, note("first"), partition=0)
    log.producer().send(EVENTS, note("second"), partition=0)
    assert await poll(reader) == []
    waiting = asyncio.create_task(poll(reader, 10, 10.0))
    await asyncio.sleep(0.01)
    writer.commit_transaction(1.0)
    assert await waiting == ["first", "second"]


async def test_mistakes_are_named() -> None:
    log = MemoryLog(TOPICS)
    with pytest.raises(LogError, match=r"topic m\.event does not exist; this log has .*m\.events"):
        log.producer().send("m.event", note("x"))
    with pytest.raises(LogError, match=r"m\.events\[4\] does not exist: m\.events has 4 partitions"):
        log.producer().send(EVENTS, note("x"), partition=4)
    alone = log.consumer()
    with pytest.raises(LogError, match="subscribe needs a consumer that was made with a group"):
        await alone.subscribe([EVENTS])
    await alone.assign([Partition(EVENTS, 0)])
    with pytest.raises(LogError, match=r"m\.events\[1\] is not assigned"):
        await alone.seek(Partition(EVENTS, 1), 0)
    with pytest.raises(LogError, match=r"m\.events\[0\] has offsets up to 0, not 7"):
        await alone.seek(Partition(EVENTS, 0), 7)
    await alone.close()
    with pytest.raises(LogError, match="closed"):
        await alone.poll(1, 0.0)


MEMBERS = st.dictionaries(st.integers(0, 6), st.sets(st.sampled_from("abc"), min_size=1), max_size=7)


@given(MEMBERS, st.fixed_dictionaries(dict.fromkeys("abc", st.integers(1, 9))), st.data())
def test_shares_are_even_and_move_no_more_than_needed(
    members: dict[int, set[str]], partitions: dict[str, int], data: st.DataObject
) -> None:
    numbers = [Partition(topic, n) for topic, count in partitions.items() for n in range(count)]
    owners = data.draw(st.dictionaries(st.sampled_from(numbers), st.integers(0, 9)))
    target = share(members, partitions, owners)
    for topic, count in partitions.items():
        subscribers = [m for m, topics in members.items() if topic in topics]
        got = Counter(dict.fromkeys(subscribers, 0))
        got.update(target[p] for p in numbers if p.topic == topic and p in target)
        assert got.total() == (count if subscribers else 0)
        assert got.keys() == set(subscribers)
        if subscribers:
            assert max(got.values()) - min(got.values()) <= 1
            # What a member holds and may keep, it keeps.
            for m in subscribers:
                held = [p for p in numbers if p.topic == topic and owners.get(p) == m]
                kept = [p for p in held if target[p] == m]
                assert len(kept) == min(len(held), got[m])
    assert share(members, partitions, target) == target


# A storm: members come, go, freeze and thaw; each reads, then commits what it read, perhaps much later. Whatever
# happens, every record is committed by exactly one of them.
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["join", "close", "read", "commit"]), st.integers(0, 3)),
        st.tuples(st.sampled_from(["freeze", "send"]), st.integers(1, 12)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS)
def test_in_a_storm_every_record_is_committed_once(operations: list[tuple[str, int]]) -> None:
    asyncio.run(storm(operations))


async def storm(operations: list[tuple[str, int]]) -> None:
    clock = Clock()
    log = MemoryLog(TOPICS, clock=clock)
    producer = log.producer()
    members: dict[int, Consumer] = {}
    pending: dict[int, list[LogRecord]] = {}
    done: Counter[tuple[int, int]] = Counter()
    sent = 0

    async def read(who: int, max_records: int = 3) -> None:
        if who in members and not pending.get(who):
            pending[who] = [r for r in await members[who].poll(max_records, 0.0) if isinstance(r, LogRecord)]

    async def commit(who: int) -> None:
        records = pending.pop(who, [])
        for partition in {r.partition for r in records}:  # each by itself: a member may have lost only some of them
            mine = [r for r in records if r.partition == partition]
            try:
                await members[who].commit({partition: mine[-1].offset + 1})
            except TransactionAborted:
                continue
            done.update((partition.number, r.offset) for r in mine)

    for operation, value in operations:
        if operation == "join" and value not in members:
            members[value] = log.consumer("g")
            await members[value].subscribe([EVENTS])
        elif operation == "close" and value in members:
            await members.pop(value).close()
            pending.pop(value, None)
        elif operation == "read":
            await read(value)
        elif operation == "commit":
            await commit(value)
        elif operation == "freeze":
            clock.now += value
        elif operation == "send":
            for _ in range(value):
                producer.send(EVENTS, note(""), partition=sent % 4)
                sent += 1
    if not members:
        members[0] = log.consumer("g")
        await members[0].subscribe([EVENTS])
    for _ in range(6):  # the storm is over; two rounds settle the members, the others read what is left
        for who in members:
            await commit(who)
            await read(who, 1000)
    for who in members:
        await commit(who)
    assert done == {(n % 4, n // 4): 1 for n in range(sent)}
    owned = [p for consumer in members.values() for p in consumer.assignment()]
    assert sorted(owned) == [Partition(EVENTS, n) for n in range(4)]
