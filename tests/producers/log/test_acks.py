"""Waiting for acknowledgements from any thread."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from millstream.producers.log.acks import Acks, send_acknowledged
from millstream.producers.log.port import OnAck
from millstream.schemas.errors import BufferFull, LogUnavailable


class HeldProducer:
    """Keeps the callbacks of what it is given, for the test to call."""

    def __init__(self) -> None:
        self.callbacks: list[OnAck] = []
        self.full = False

    def send(self, topic: str, value: Any, *, on_ack: OnAck | None = None, **_: Any) -> None:
        if self.full:
            raise BufferFull(topic)
        assert on_ack is not None
        self.callbacks.append(on_ack)


async def test_wait_returns_when_the_last_record_is_acknowledged() -> None:
    producer = HeldProducer()
    acks = Acks(producer)
    for _ in range(3):
        acks.send("t", b"x")
    waiting = [asyncio.ensure_future(acks.wait()) for _ in range(2)]
    with ThreadPoolExecutor(1) as thread:
        for offset, on_ack in enumerate(producer.callbacks[:2]):
            thread.submit(on_ack, None, offset).result()
        assert acks.pending == 1
        await asyncio.sleep(0)
        assert not any(wait.done() for wait in waiting)
        thread.submit(producer.callbacks[2], None, 2).result()
    assert await asyncio.gather(*waiting) == [2, 2]
    assert await acks.wait() == 2


async def test_the_first_refusal_is_raised_once_all_are_settled() -> None:
    producer = HeldProducer()
    acks = Acks(producer)
    for _ in range(2):
        acks.send("t", b"x")
    producer.callbacks[0](LogUnavailable("away"), -1)
    waiting = asyncio.ensure_future(acks.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    producer.callbacks[1](None, 7)
    with pytest.raises(LogUnavailable, match="away"):
        await waiting


async def test_a_record_that_is_not_taken_is_not_waited_for() -> None:
    producer = HeldProducer()
    producer.full = True
    acks = Acks(producer)
    with pytest.raises(BufferFull):
        acks.send("t", b"x")
    assert (acks.sent, acks.pending, await acks.wait()) == (0, 0, -1)
    with pytest.raises(BufferFull):
        await send_acknowledged(producer, "t", b"x")


async def test_an_acknowledgement_after_the_waiter_gave_up_is_harmless() -> None:
    producer = HeldProducer()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await send_acknowledged(producer, "t", b"x")
    producer.callbacks[0](None, 0)
    await asyncio.sleep(0)
