"""What the in-memory log promises beyond the contract that all logs share."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.log.port import Consumer
from millstream.schemas.errors import LogError, TransactionAborted
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import Control
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("m", 4)
EVENTS = TOPICS.events
FOREVER_S = 3600.0


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


async def started(polling: "asyncio.Task[list[str]]") -> None:
    """Returns when the poll waits for records."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not polling.done()


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
    """Two event loops in two threads send each other a record; a poll that misses its wake-up never ends."""
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
                assert len(await poll(consumer, 10, FOREVER_S)) == 1
                producer.send(EVENTS, note("x"), partition=other)

        asyncio.run(run())

    threads = [threading.Thread(target=play, args=args, daemon=True) for args in ((0, 1, True), (1, 0, False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


async def test_a_cancelled_poll_loses_nothing() -> None:
    log = MemoryLog(TOPICS)
    consumer = log.consumer("g")
    await consumer.subscribe([EVENTS])
    waiting = asyncio.create_task(poll(consumer, 10, FOREVER_S))
    await started(waiting)
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


async def test_a_group_has_one_member_a_topic() -> None:
    log = MemoryLog(TOPICS)
    first, second = log.consumer("g"), log.consumer("g")
    await first.subscribe([EVENTS])
    with pytest.raises(LogError, match=r"group g already reads m\.events: .* several need Kafka"):
        await second.subscribe([TOPICS.triplets, EVENTS])
    await second.subscribe([TOPICS.triplets])
    await log.consumer("other").subscribe([EVENTS])
    await first.close()
    heard, successor = Listener(), log.consumer("g")
    await successor.subscribe([EVENTS], heard)
    assert await poll(successor) == []
    assert heard.calls == [("assign", [0, 1, 2, 3])]


async def test_only_the_member_that_reads_a_topic_commits_it() -> None:
    log, partition = MemoryLog(TOPICS), Partition(EVENTS, 0)
    member, bystander = log.consumer("g"), log.consumer("g")
    await bystander.commit({partition: 1})  # a group without members
    await member.subscribe([EVENTS])
    with pytest.raises(TransactionAborted, match=r"m\.events\[0\] does not belong to this member of group g"):
        await bystander.commit({partition: 2})
    with pytest.raises(TransactionAborted):
        await member.commit({Partition(TOPICS.triplets, 0): 1})
    await member.commit({partition: 3})
    assert await bystander.committed([partition]) == {partition: 3}


async def test_a_member_that_leaves_before_the_commit_aborts_the_whole_transaction() -> None:
    log = MemoryLog(TOPICS)
    member = log.transactional_consumer("g")
    await member.subscribe([EVENTS])
    await member.poll(1, 0.0)
    producer = log.transactional_producer("t")
    producer.init_transactions(1.0)
    producer.begin_transaction()
    producer.send(TOPICS.triplets, note("late"), partition=0)
    producer.send_offsets({Partition(EVENTS, 0): 5}, member.group_metadata(), 1.0)
    await member.close()
    for _ in range(2):  # until it is aborted
        with pytest.raises(TransactionAborted):
            producer.commit_transaction(1.0)
    producer.abort_transaction(1.0)
    assert await log.consumer("g").committed([Partition(EVENTS, 0)]) == {Partition(EVENTS, 0): None}
    reader = log.consumer()
    await reader.assign([Partition(TOPICS.triplets, 0)])
    assert await poll(reader) == []


async def test_a_producer_that_never_began_lifts_no_fence() -> None:
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
    waiting = asyncio.create_task(poll(reader, 10, FOREVER_S))
    await started(waiting)
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
