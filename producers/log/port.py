"""The log-producer port: what a process needs to write to a log, whichever log it is.

Kafka's form is `kafka.KafkaProducer`; the in-memory one is in `consumers/log/memory_log.py`. One suite of contract
tests (`tests/consumers/log/`) runs against both.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

from millstream.schemas.wire.log import Headers, Partition
from millstream.schemas.wire.records import Record

LINGER_MS: Final = 2.0  # for throughput; who awaits each acknowledgement wants none

# Called once per record, from any thread, with (None, offset) or (error, -1). Must not block and must not raise.
OnAck = Callable[[Exception | None, int], None]


class Sender(Protocol):
    """Takes records for a log."""

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
        """Hands a record over, from any thread; does not imply that it is stored.

        A record that is not yet encoded is encoded if the log needs it. Records of one partition keep the order of the
        calls. Without ``partition`` the key decides (`topics.partition_of`). While the buffer is full the caller waits
        (that is the back-pressure which slows an agent), for at most a minute.

        Raises `BufferFull`, `TooLarge`, `CodecError`, `Fenced`; never drops. In a transaction ``on_ack`` means
        "written"; readers see the record once the transaction has been committed.
        """


class Producer(Sender, Protocol):
    """Writes records. Idempotent: a record that the client itself sends again is stored once."""

    def flush(self, timeout_s: float) -> None:
        """Waits until everything handed over is acknowledged or refused. Raises `LogUnavailable` at the deadline."""

    def close(self, timeout_s: float = 10.0) -> None:
        """Flushes (an open transaction is aborted) and lets go. Raises `LogUnavailable` if something is unsent."""


class TransactionalProducer(Producer, Protocol):
    """A producer whose records and consumer offsets become visible together, or never. One thread at a time.

    Each call raises `LogUnavailable` (repeat the same call; after ``commit_transaction`` nothing else is allowed),
    `TransactionAborted` (call ``abort_transaction``, then begin anew) or `Fenced` (stop).
    """

    def init_transactions(self, timeout_s: float) -> None:
        """Once, first: fences every older producer with the same transactional id, finishes what it left open."""

    def begin_transaction(self) -> None: ...

    def send_offsets(self, offsets: Mapping[Partition, int], group: Any, timeout_s: float) -> None:
        """Adds the group's next offsets. ``group`` is the consumer's ``group_metadata()`` *as taken in on_assign*:
        with a younger one a zombie could commit another member's partition. Call ``flush`` before."""

    def commit_transaction(self, timeout_s: float) -> None: ...

    def abort_transaction(self, timeout_s: float) -> None: ...


@asynccontextmanager
async def closing(producer: Producer) -> AsyncIterator[Producer]:
    """Closes it behind the body, while the event loop goes on. Raises as ``close`` does."""
    try:
        yield producer
    finally:
        await asyncio.to_thread(producer.close)
