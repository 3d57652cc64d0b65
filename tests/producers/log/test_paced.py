"""How a `PacedProducer` groups records into batches."""

import asyncio
from typing import Any

import pytest

from millstream.producers.log.acks import send_acknowledged
from millstream.producers.log.paced import PacedProducer, PacePolicy
from millstream.producers.log.port import OnAck
from millstream.schemas.errors import TooLarge

NEVER = PacePolicy(stalled_s=3600.0)


class Broker:
    """Takes records and acknowledges them when the test says so."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self._callbacks: list[OnAck] = []
        self._more = asyncio.Event()

    def send(self, topic: str, value: Any, *, on_ack: OnAck | None = None, **_: Any) -> None:
        if value == b"large":
            raise TooLarge(topic)
        assert on_ack is not None
        self.taken.append(value)
        self._callbacks.append(on_ack)
        self._more.set()

    def acknowledge(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for on_ack in callbacks:
            on_ack(None, 0)

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(10.0):
            while len(self.taken) < count:
                self._more.clear()
                await self._more.wait()

    def flush(self, timeout_s: float) -> None: ...

    def close(self, timeout_s: float = 10.0) -> None: ...


async def test_a_record_that_is_alone_goes_out_at_once() -> None:
    broker = Broker()
    producer = PacedProducer(broker, NEVER)
    for number in range(3):
        sent = asyncio.ensure_future(send_acknowledged(producer, "t", b"%d" % number))
        await asyncio.sleep(0)
        assert len(broker.taken) == number + 1
        broker.acknowledge()
        await sent


async def test_records_sent_meanwhile_go_out_together_when_those_in_flight_are_acknowledged() -> None:
    broker = Broker()
    producer = PacedProducer(broker, NEVER)
    sent = [asyncio.ensure_future(send_acknowledged(producer, "t", b"%d" % number)) for number in range(4)]
    await asyncio.sleep(0)
    assert broker.taken == [b"0"]
    broker.acknowledge()
    await broker.wait_for(4)
    assert broker.taken == [b"0", b"1", b"2", b"3"]
    broker.acknowledge()
    await asyncio.gather(*sent)


async def test_a_batch_without_an_acknowledgement_holds_up_others_only_so_long() -> None:
    broker = Broker()
    producer = PacedProducer(broker, PacePolicy(stalled_s=0.01))
    producer.send("t", b"stalled")
    producer.send("t", b"other")
    assert broker.taken == [b"stalled"]
    await broker.wait_for(2)


async def test_a_record_that_is_never_acknowledged_times_out() -> None:
    broker = Broker()
    producer = PacedProducer(broker, PacePolicy(timeout_s=0.01))
    with pytest.raises(TimeoutError, match="not acknowledge"):
        await send_acknowledged(producer, "t", b"lost")
    broker.acknowledge()  # late
    sent = asyncio.ensure_future(send_acknowledged(producer, "t", b"next"))
    await broker.wait_for(2)
    broker.acknowledge()
    assert await sent == 0


async def test_a_refused_record_fails_its_own_sender_alone() -> None:
    broker = Broker()
    producer = PacedProducer(broker, NEVER)
    first = asyncio.ensure_future(send_acknowledged(producer, "t", b"first"))
    await asyncio.sleep(0)
    large, small = (asyncio.ensure_future(send_acknowledged(producer, "t", value)) for value in (b"large", b"small"))
    await asyncio.sleep(0)
    broker.acknowledge()
    with pytest.raises(TooLarge):
        await large
    await broker.wait_for(2)
    broker.acknowledge()
    assert await asyncio.gather(first, small) == [0, 0]
