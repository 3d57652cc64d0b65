"""The promises of `producers.port`, on every log."""

import threading
from collections import Counter

import pytest
from contract_helpers import (
    CALL_S,
    MAX_RECORD_BYTES,
    PARTITIONS,
    SEVERAL_MEMBERS,
    LogUnderTest,
    Member,
    by_partition,
    name_of,
    names,
    note,
    poll_until,
    read,
    read_nothing,
)

from millstream.producers.log.acks import send_acknowledged
from millstream.producers.log.port import TransactionalProducer
from millstream.schemas.errors import Fenced, LogError, TooLarge, TransactionAborted, WrongType
from millstream.schemas.wire.codec import decode, encode
from millstream.schemas.wire.log import KIND_HEADER, LogRecord, Partition
from millstream.schemas.wire.records import Control
from millstream.schemas.wire.topics import partition_of


async def read_events(log: LogUnderTest, count: int) -> list[LogRecord]:
    consumer = log.consumer()
    await consumer.assign([Partition(log.topics.events, n) for n in range(PARTITIONS)])
    return await read(consumer, count)


async def read_no_event(log: LogUnderTest) -> None:
    consumer = log.consumer()
    await consumer.assign([Partition(log.topics.events, n) for n in range(PARTITIONS)])
    await read_nothing(log, consumer)


async def test_a_record_arrives_as_it_was_sent(log: LogUnderTest) -> None:
    producer = log.producer()
    sent = note("one")
    offset = await send_acknowledged(producer, log.topics.events, sent, key="k", headers={KIND_HEADER: b"note"})
    raw = await send_acknowledged(producer, log.topics.events, encode(note("two")), key="k")
    first, second = await read_events(log, 2)
    assert decode(first.value) == sent
    assert name_of(second) == "two"
    assert (first.offset, second.offset) == (offset, raw)
    assert first.key == second.key == "k"
    assert dict(first.headers) == {KIND_HEADER: b"note"}
    assert dict(second.headers) == {}
    assert 0 <= second.timestamp - first.timestamp < 60_000
    assert first.timestamp > 1_600_000_000_000  # ms since the epoch


async def test_a_key_decides_its_partition_by_our_partitioner(log: LogUnderTest) -> None:
    producer = log.producer()
    keys = [f"rollout-{n}" for n in range(1000)]
    for key in keys:
        producer.send(log.topics.events, note(key), key=key)
    producer.flush(CALL_S)
    found = {name_of(r): r.partition.number for r in await read_events(log, len(keys))}
    assert found == {key: partition_of(key, PARTITIONS) for key in keys}


async def test_the_partition_goes_before_the_key(log: LogUnderTest) -> None:
    other = (partition_of("k", PARTITIONS) + 1) % PARTITIONS
    await send_acknowledged(log.producer(), log.topics.events, note("here"), key="k", partition=other)
    (record,) = await read_events(log, 1)
    assert record.partition == Partition(log.topics.events, other)
    assert record.key == "k"


async def test_without_key_and_partition_every_record_arrives_once(log: LogUnderTest) -> None:
    producer = log.producer()
    for n in range(50):
        producer.send(log.topics.events, note(str(n)))
    producer.flush(CALL_S)
    assert Counter(names(await read_events(log, 50))) == {str(n): 1 for n in range(50)}


async def test_threads_send_side_by_side_and_each_keeps_its_order(log: LogUnderTest) -> None:
    producer = log.producer()
    acks: list[tuple[int, int]] = []
    errors: list[Exception] = []

    def send(thread: int) -> None:
        partition = thread % PARTITIONS

        def on_ack(error: Exception | None, offset: int) -> None:
            acks.append((partition, offset))
            if error is not None:
                errors.append(error)

        for n in range(100):
            producer.send(log.topics.events, note(f"{thread}/{n}"), partition=partition, on_ack=on_ack)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(2 * PARTITIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    producer.flush(CALL_S)
    assert errors == []
    assert len(acks) == len(set(acks)) == 200 * PARTITIONS

    records = await read_events(log, 200 * PARTITIONS)
    assert {(r.partition.number, r.offset) for r in records} == set(acks)
    for number, found in by_partition(records).items():
        assert [r.offset for r in found] == sorted(r.offset for r in found), number
    for thread in range(2 * PARTITIONS):
        mine = [name for name in names(records) if name.startswith(f"{thread}/")]
        assert mine == [f"{thread}/{n}" for n in range(100)]


async def test_what_is_too_large_is_refused_and_the_next_goes_on(log: LogUnderTest) -> None:
    producer = log.producer()
    acks: list[object] = []
    with pytest.raises(TooLarge):
        producer.send(log.topics.events, bytes(MAX_RECORD_BYTES + 1), partition=0, on_ack=lambda *ack: acks.append(ack))
    await send_acknowledged(producer, log.topics.events, note("small"), partition=0)
    assert names(await read_events(log, 1)) == ["small"]
    assert acks == []


async def test_what_does_not_fit_its_schema_is_refused_by_name(log: LogUnderTest) -> None:
    if log.kind == "memory":
        pytest.skip("nothing is encoded")
    with pytest.raises(WrongType, match=r"^Control\.created_at:"):
        log.producer().send(log.topics.events, Control(kind="k", name="n", body="", created_at="soon"))


async def test_close_stores_what_was_handed_over(log: LogUnderTest) -> None:
    producer = log.producer()
    for n in range(20):
        producer.send(log.topics.events, note(str(n)), partition=0)
    producer.close(CALL_S)
    assert names(await read_events(log, 20)) == [str(n) for n in range(20)]


async def test_a_transaction_is_seen_when_it_is_committed_and_not_before(log: LogUnderTest) -> None:
    producer = log.transactional_producer()
    acks: list[tuple[Exception | None, int]] = []
    producer.begin_transaction()
    for n in range(6):
        producer.send(
            log.topics.events,
            note(str(n)),
            partition=n % 2,
            on_ack=lambda error, offset: acks.append((error, offset)),
        )
    producer.flush(CALL_S)
    assert [error for error, _ in acks] == [None] * 6  # "written" comes before the commit
    await read_no_event(log)
    producer.commit_transaction(CALL_S)
    found = by_partition(await read_events(log, 6))
    assert [names(found[Partition(log.topics.events, n)]) for n in (0, 1)] == [["0", "2", "4"], ["1", "3", "5"]]
    assert sorted(r.offset for records in found.values() for r in records) == sorted(offset for _, offset in acks)


async def test_the_end_counts_open_transactions(log: LogUnderTest) -> None:
    producer = log.transactional_producer()
    partition = Partition(log.topics.events, 0)
    consumer = log.consumer()
    producer.begin_transaction()
    producer.send(log.topics.events, note("open"), partition=0)
    producer.flush(CALL_S)
    assert (await consumer.end_offsets([partition]))[partition] >= 1
    producer.abort_transaction(CALL_S)


async def test_an_aborted_transaction_is_never_seen(log: LogUnderTest) -> None:
    producer = log.transactional_producer()
    producer.begin_transaction()
    producer.send(log.topics.events, note("aborted"), partition=0)
    producer.flush(CALL_S)
    producer.abort_transaction(CALL_S)
    producer.begin_transaction()
    producer.send(log.topics.events, note("committed"), partition=0)
    producer.commit_transaction(CALL_S)
    plain = log.producer()
    await send_acknowledged(plain, log.topics.events, note("after"), partition=0)
    assert names(await read_events(log, 2)) == ["committed", "after"]


async def test_close_aborts_what_is_open(log: LogUnderTest) -> None:
    producer = log.transactional_producer()
    producer.begin_transaction()
    producer.send(log.topics.events, note("open"), partition=0)
    producer.flush(CALL_S)
    producer.close(10.0)
    await send_acknowledged(log.producer(), log.topics.events, note("after"), partition=0)
    assert names(await read_events(log, 1)) == ["after"]


async def test_calls_in_the_wrong_order_are_told(log: LogUnderTest) -> None:
    early = log.log.transactional_producer("early")
    log.made.append(early)
    with pytest.raises(LogError):
        early.begin_transaction()
    producer = log.transactional_producer()
    with pytest.raises(LogError):
        producer.commit_transaction(CALL_S)
    with pytest.raises(LogError):
        producer.send(log.topics.events, note("outside of a transaction"), partition=0)
    await read_no_event(log)


async def consuming(log: LogUnderTest, count: int, name: str = "team") -> Member:
    """A member that owns every partition of ``events``, has read ``count`` records and holds the group's metadata."""
    member = Member(log.transactional_consumer(name))
    member.take_metadata = True
    await member.join(log.topics.events)
    await poll_until("owns everything", lambda: len(member.owned) == PARTITIONS, member)
    await poll_until("has read", lambda: len(member.records) >= count, member)
    return member


def process(producer: TransactionalProducer, log: LogUnderTest, result: str, offset: int, metadata: object) -> None:
    """Read events, write a triplet: everything that a stream processor does up to its commit."""
    producer.begin_transaction()
    producer.send(log.topics.triplets, note(result), partition=0)
    producer.flush(CALL_S)
    producer.send_offsets({Partition(log.topics.events, 0): offset}, metadata, CALL_S)


async def send_events(log: LogUnderTest, count: int) -> None:
    producer = log.producer()
    for n in range(count):
        producer.send(log.topics.events, note(str(n)), partition=0)
    producer.flush(CALL_S)


async def read_triplets(log: LogUnderTest, count: int) -> list[str]:
    consumer = log.consumer()
    await consumer.assign([Partition(log.topics.triplets, 0)])
    return names(await read(consumer, count))


async def test_records_and_offsets_are_committed_together_or_neither(log: LogUnderTest) -> None:
    await send_events(log, 3)
    member = await consuming(log, 3)
    producer = log.transactional_producer()
    events = Partition(log.topics.events, 0)

    process(producer, log, "dropped", 3, member.metadata)
    producer.abort_transaction(CALL_S)
    group = log.consumer("team")
    assert await group.committed([events]) == {events: None}

    process(producer, log, "kept", 2, member.metadata)
    producer.commit_transaction(CALL_S)
    assert await read_triplets(log, 1) == ["kept"]
    assert await group.committed([events]) == {events: 2}
    await member.consumer.close()
    successor = await consuming(log, 1)
    assert names(successor.records) == ["2"]


async def test_a_newer_producer_fences_an_older_one(log: LogUnderTest) -> None:
    older = log.transactional_producer()
    older.begin_transaction()
    older.send(log.topics.triplets, note("older"), partition=0)
    older.flush(CALL_S)
    newer = log.transactional_producer()
    with pytest.raises(Fenced):
        older.commit_transaction(CALL_S)
    newer.begin_transaction()
    newer.send(log.topics.triplets, note("newer"), partition=0)
    newer.commit_transaction(CALL_S)
    assert await read_triplets(log, 1) == ["newer"]
    with pytest.raises(Fenced):
        older.begin_transaction()


async def test_a_member_that_has_left_commits_nothing(log: LogUnderTest) -> None:
    await send_events(log, 3)
    zombie = await consuming(log, 3)
    stale = zombie.metadata
    await zombie.consumer.close()
    successor = await consuming(log, 3)
    producer = log.transactional_producer("zombie")
    with pytest.raises(TransactionAborted):
        process(producer, log, "zombie's", 3, stale)
    producer.abort_transaction(CALL_S)

    process(producer, log, "successor's", 1, successor.metadata)
    producer.commit_transaction(CALL_S)
    assert await read_triplets(log, 1) == ["successor's"]
    events = Partition(log.topics.events, 0)
    assert await log.consumer("team").committed([events]) == {events: 1}


@SEVERAL_MEMBERS
async def test_metadata_from_before_a_rebalance_commits_nothing_that_was_lost(log: LogUnderTest) -> None:
    await send_events(log, 1)
    first = await consuming(log, 1)
    stale = first.metadata
    second = Member(log.transactional_consumer("team"))
    second.take_metadata = True
    await second.join(log.topics.events)
    await poll_until("both own", lambda: first.owned and second.owned, first, second)
    await poll_until("everything is owned", lambda: len(first.owned | second.owned) == PARTITIONS, first, second)

    lost = min(second.owned)
    producer = log.transactional_producer()
    producer.begin_transaction()
    producer.send(log.topics.triplets, note("zombie's"), partition=0)
    producer.flush(CALL_S)
    with pytest.raises(TransactionAborted):
        producer.send_offsets({lost: 0}, stale, CALL_S)
    producer.abort_transaction(CALL_S)
    producer.begin_transaction()
    producer.send(log.topics.triplets, note("the owner's"), partition=0)
    producer.flush(CALL_S)
    producer.send_offsets({lost: 0}, second.metadata, CALL_S)
    producer.commit_transaction(CALL_S)
    assert await read_triplets(log, 1) == ["the owner's"]
