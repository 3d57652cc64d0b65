"""Waiting for acknowledgements: counts the records handed to a producer against those that it acknowledged."""

import asyncio
import threading

from millstream.producers.log.port import Sender
from millstream.schemas.wire.log import Headers
from millstream.schemas.wire.records import Record


class Acks:
    """Sends through a producer, from any thread, and knows when everything is stored."""

    __slots__ = ("_lock", "_offset", "_producer", "_settled", "_waiters", "error", "sent")

    def __init__(self, producer: Sender) -> None:
        self._producer = producer
        self._lock = threading.Lock()
        self._settled = 0
        self._offset = -1
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.sent = 0
        self.error: Exception | None = None  # the first refusal

    def send(
        self,
        topic: str,
        value: Record | bytes,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers | None = None,
    ) -> None:
        """Like `Producer.send`, and raises what it raises; a record for which it raises is not counted."""
        with self._lock:
            self.sent += 1
        try:
            self._producer.send(topic, value, key=key, partition=partition, headers=headers, on_ack=self._on_ack)
        except BaseException:
            with self._lock:
                self.sent -= 1
            raise

    @property
    def pending(self) -> int:
        """Records sent, and neither acknowledged nor refused yet."""
        return self.sent - self._settled

    async def wait(self) -> int:
        """Returns once everything sent so far is acknowledged or refused, with the offset of the last acknowledged
        record. Raises the first refusal."""
        loop = asyncio.get_running_loop()
        with self._lock:
            waiter = None
            if self._settled < self.sent:
                waiter = loop.create_future()
                self._waiters.append((loop, waiter))
        if waiter is not None:
            await waiter
        if self.error is not None:
            raise self.error
        return self._offset

    def _on_ack(self, error: Exception | None, offset: int) -> None:
        with self._lock:
            self._settled += 1
            if error is None:
                self._offset = offset
            elif self.error is None:
                self.error = error
            if self._settled < self.sent or not self._waiters:
                return
            waiters, self._waiters = self._waiters, []
        running = asyncio._get_running_loop()
        for loop, waiter in waiters:
            if loop is running:  # a `PacedProducer` reports within the loop: waking it up costs more than the rest
                _wake(waiter)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(_wake, waiter)


async def send_acknowledged(
    producer: Sender,
    topic: str,
    value: Record | bytes,
    *,
    key: str | None = None,
    partition: int | None = None,
    headers: Headers | None = None,
) -> int:
    """Sends a record and waits until it is stored; returns its offset. Raises what ``send`` raises, and `LogError`."""
    acks = Acks(producer)
    acks.send(topic, value, key=key, partition=partition, headers=headers)
    return await acks.wait()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
