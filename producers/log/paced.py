"""Sends from one event loop in batches: cheap for many senders, fast for one.

A record that is alone goes out at once. Records that come while others are being sent go out together, as soon as
those are acknowledged (as in Nagle's algorithm, RFC 896). This replaces the producer's own lingering, which delays a
record even if no other follows: a request to the brokers costs more than the records in it. Acknowledgements that
arrive together wake the loop once.
"""

import asyncio
import itertools
import threading
from dataclasses import dataclass
from functools import partial as bind

from millstream.producers.log.port import OnAck, Producer
from millstream.schemas.errors import BufferFull
from millstream.schemas.wire.log import Headers
from millstream.schemas.wire.records import Record


@dataclass(frozen=True, slots=True)
class PacePolicy:
    """When batches go out."""

    pause_s: float = 0.01  # minimum between two batches of more than one record
    # For the producer that sends them: a batch, handed over record by record, becomes one request. With 0 librdkafka
    # sends its first record alone, the others after it, and spins once five requests are in flight.
    linger_ms: float = 0.2
    # A partition without a leader delays the records of other partitions by at most this. Long enough that a slow
    # broker still gets batches.
    stalled_s: float = 0.05
    timeout_s: float = 30.0  # until a record without an acknowledgement counts as refused; it may still be stored


class PacedProducer:
    """A `Sender` of the running event loop; all calls, and all calls of ``on_ack``, are made there."""

    def __init__(self, producer: Producer, policy: PacePolicy = PacePolicy()) -> None:
        """``producer`` should linger for ``policy.linger_ms``."""
        self._producer = producer
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._held: list[tuple[int, str, Record | bytes, str | None, int | None, Headers | None]] = []
        self._in_flight = 0
        self._due = 0.0  # when the next batch may go, by the loop's clock, unless one is in flight
        self._next: asyncio.TimerHandle | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[float, OnAck | None]] = {}  # record's number → deadline, oldest first
        self._expiry: asyncio.TimerHandle | None = None  # one timer for all: a timer per record costs more
        self._lock = threading.Lock()
        self._settled: list[tuple[int, Exception | None, int]] = []  # guarded by the lock
        self.full = False  # the producer has refused a record for want of room, and none has left it since

    def send(
        self,
        topic: str,
        value: Record | bytes,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers | None = None,
        on_ack: OnAck | None = None,
    ) -> None:
        """Never raises: ``on_ack`` gets what `Producer.send` raises, or `TimeoutError`."""
        number, deadline = next(self._numbers), self._loop.time() + self._policy.timeout_s
        self._waiting[number] = deadline, on_ack
        if self._expiry is None:
            self._expiry = self._loop.call_at(deadline, self._expire)
        self._held.append((number, topic, value, key, partition, headers))
        if self._next is None:
            self._hand_over()

    def _hand_over(self) -> None:
        """Sends what is held, now or when it is due."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if not self._held:
            return
        now = self._loop.time()
        due = self._due + (self._policy.stalled_s if self._in_flight else 0.0)
        if now < due:
            self._next = self._loop.call_at(due, self._hand_over)
            return
        held, self._held = self._held, []
        self._due = now + (self._policy.pause_s if len(held) > 1 else 0.0)
        for number, topic, value, key, partition, headers in held:
            self._in_flight += 1
            settle = bind(self._on_ack, number)
            try:
                self._producer.send(topic, value, key=key, partition=partition, headers=headers, on_ack=settle)
            except Exception as error:
                settle(error, -1)

    def _on_ack(self, number: int, error: Exception | None, offset: int) -> None:
        """From any thread."""
        with self._lock:
            first = not self._settled
            self._settled.append((number, error, offset))
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        with self._lock:
            settled, self._settled = self._settled, []
        self._in_flight -= len(settled)
        for number, error, offset in settled:
            self.full = isinstance(error, BufferFull)
            self._report(number, error, offset)
        if not self._in_flight:
            self._hand_over()

    def _report(self, number: int, error: Exception | None, offset: int) -> None:
        _, on_ack = self._waiting.pop(number, (0.0, None))  # an expired one has been reported
        if on_ack is not None:
            on_ack(error, offset)

    def _expire(self) -> None:
        self._expiry = None
        while self._waiting:
            number, (deadline, _) = next(iter(self._waiting.items()))
            if deadline > self._loop.time():
                self._expiry = self._loop.call_at(deadline, self._expire)
                return
            self._report(number, TimeoutError("the log did not acknowledge the record in time"), -1)
