"""What the collector waits for, and what it gives up."""

import asyncio
from typing import Any

import pytest
from factories import finished, task

from millstream.consumers.log.memory_log import MemoryLog
from millstream.pipeline.training.collector import Collector, CollectorPolicy
from millstream.schemas.wire import codec
from millstream.schemas.wire.topics import Topics

TOPICS = Topics("t", partitions=2)


async def collecting(log: MemoryLog, **policy: Any) -> Collector:
    collector = Collector(log, TOPICS, log.producer(), CollectorPolicy(poll_s=0.01, **policy))
    await collector.start()
    return collector


async def test_a_rollout_that_the_log_has_dropped_is_not_waited_for() -> None:
    """Entry C2: `collect` waited for ever."""
    collector = await collecting(MemoryLog(TOPICS), wait_s=0.05)
    collector.expect(["a"])
    (found,) = await collector.collect(["a"])
    assert (found.end.status, found.end.trainable, found.triplets) == ("failed", False, ())
    assert "the log has dropped it" in (found.end.reason or "")
    assert collector.outstanding == frozenset()


async def test_an_end_that_is_read_before_its_rollout_is_expected_is_found() -> None:
    """A run that goes on starts to read, and then asks for its predecessor's rollouts again."""
    log = MemoryLog(TOPICS)
    ended = [finished(task().rollout_id, []).end for _ in range(4)]
    for end in ended:
        log.producer().send(TOPICS.triplets, codec.encode(end), key=end.rollout_id)
    collector = Collector(log, TOPICS, log.producer(), CollectorPolicy(poll_s=0.01))
    assert await collector.start({0: 0, 1: 0}, "")
    while sum(collector.positions().values()) < len(ended):  # noqa: ASYNC110 - there is no event for what is ignored
        await asyncio.sleep(0)
    ids = [end.rollout_id for end in ended]
    collector.expect(ids)
    shown: list[tuple[int, int]] = []
    assert [found.end for found in await collector.collect(ids, lambda *done: shown.append(done))] == ended
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)]
    await collector.close()


@pytest.mark.parametrize("body", [b"garbage", b"\xc3\x01newer...body"])
async def test_an_end_that_cannot_be_read_ends_its_rollout(body: bytes) -> None:
    """Entry C2: for example of a newer schema."""
    log = MemoryLog(TOPICS)
    collector = await collecting(log)
    of = task()
    collector.expect([of.rollout_id])
    log.producer().send(TOPICS.triplets, body, key=of.rollout_id, headers={"kind": b"end"})
    (found,) = await collector.collect([of.rollout_id])
    assert (found.end.status, (found.end.reason or "")[:22]) == ("failed", "its end can't be read:")
    assert len(log.partitions[TOPICS.dead][0].records) == 1
