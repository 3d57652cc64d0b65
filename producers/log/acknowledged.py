"""Sends from one event loop and awaits acknowledgements: cheap when there are many, quick when there is one.

A record that is alone goes out at once. Those that come while others are under way go out together, as soon as these
are acknowledged (as in Nagle's algorithm, RFC 896). That takes the place of the producer's own lingering, for which a
record waits even if no other comes: a request to the brokers costs more than the records that are in it.
Acknowledgements that come together wake the loop once.
"""

import asyncio
import threading
from functools import partial as bind
from typing import Final

from millstream.producers.log.port import Producer
from millstream.schemas.wire.log import Headers
from millstream.schemas.wire.records import Record

PAUSE_S: Final = 0.01  # between two batches of more than one record, at least
# The producer's own lingering: so that a batch, handed over record by record, is one request. With 0 librdkafka sends
# its first record alone, the next ones after it, and spins as soon as five requests are under way.
BURST_MS: Final = 0.2
# At most: a partition whose leader is away must not hold up the others. Long enough for that limit at a slow broker.
STALLED_S: Final = 0.05


class AcknowledgedSends:
    """Belongs to the running event loop."""

    def __init__(self, producer: Producer, timeout_s: float) -> None:
        """``producer`` should linger for `BURST_MS`."""
        self._producer = producer
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._held: list[tuple[asyncio.Future[int], str, Record | bytes, str, Headers]] = []
        self._under_way = 0
        self._due = 0.0  # when the next batch may go, by the loop's clock, unless one is under way
        self._next: asyncio.TimerHandle | None = None
        self._waiting: dict[asyncio.Future[int], float] = {}  # with their deadlines; the oldest first
        self._expiring: asyncio.TimerHandle | None = None
        self._lock = threading.Lock()
        self._settled: list[tuple[asyncio.Future[int], Exception | None, int]] = []  # guarded by the lock

    def send(self, topic: str, value: Record | bytes, *, key: str, headers: Headers) -> asyncio.Future[int]:
        """The offset, once the record is stored. The future raises what `Producer.send` raises, `LogError`, or
        `TimeoutError` if the record is not acknowledged within ``timeout_s``; it may still be stored then."""
        done: asyncio.Future[int] = self._loop.create_future()
        deadline = self._loop.time() + self._timeout_s
        self._waiting[done] = deadline
        if self._expiring is None:
            self._expiring = self._loop.call_at(deadline, self._expire)
        self._held.append((done, topic, value, key, headers))
        if self._next is None:
            self._hand_over()
        return done

    def _hand_over(self) -> None:
        """What is held, if it is time; otherwise then."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if not self._held:
            return
        now = self._loop.time()
        due = self._due + (STALLED_S if self._under_way else 0.0)
        if now < due:
            self._next = self._loop.call_at(due, self._hand_over)
            return
        held, self._held = self._held, []
        self._due = now + (PAUSE_S if len(held) > 1 else 0.0)
        for done, topic, value, key, headers in held:
            self._under_way += 1
            try:
                self._producer.send(topic, value, key=key, headers=headers, on_ack=bind(self._on_ack, done))
            except Exception as error:
                self._settle(done, error, -1)

    def _on_ack(self, done: asyncio.Future[int], error: Exception | None, offset: int) -> None:
        """From any thread."""
        with self._lock:
            first = not self._settled
            self._settled.append((done, error, offset))
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        with self._lock:
            settled, self._settled = self._settled, []
        for done, error, offset in settled:
            self._settle(done, error, offset)
        if not self._under_way:
            self._hand_over()

    def _settle(self, done: asyncio.Future[int], error: Exception | None, offset: int) -> None:
        self._under_way -= 1
        self._waiting.pop(done, None)
        if done.done():  # it came too late, or its waiter has gone
            return
        if error is None:
            done.set_result(offset)
        else:
            done.set_exception(error)

    def _expire(self) -> None:
        self._expiring = None
        while self._waiting:
            done, deadline = next(iter(self._waiting.items()))
            if deadline > self._loop.time():
                self._expiring = self._loop.call_at(deadline, self._expire)
                return
            del self._waiting[done]
            if not done.done():
                done.set_exception(TimeoutError("the log did not acknowledge the record in time"))
