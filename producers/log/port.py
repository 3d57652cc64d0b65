"""The producer port: how a process writes to a log.

Implemented by `kafka.KafkaProducer` and `consumers/log/memory_producer.py`. The contract tests in
`tests/consumers/log/` run against both.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

from millstream.schemas.wire.log import Headers, Partition
from millstream.schemas.wire.records import Record

LINGER_MS: Final = 2.0  # for throughput; a sender that awaits each acknowledgement wants less

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
        """Hands a record over, from any thread. Returning does not imply that it is stored.

        The log encodes the record if necessary. Records of one partition keep the order of the calls. Without
        ``partition`` the key decides (`topics.partition_of`). While the buffer is full the caller waits, at most a
        minute: this back-pressure slows agents down.

        Raises `BufferFull`, `TooLarge`, `CodecError`, `Fenced`; never drops a record. In a transaction ``on_ack``
        means "written"; readers see the record after the commit.
        """


class Producer(Sender, Protocol):
    """Writes records. Idempotent: a record that the client retries is stored once."""

    def flush(self, timeout_s: float) -> None:
        """Waits until everything handed over is acknowledged or refused. Raises `LogUnavailable` at the deadline."""

    def close(self, timeout_s: float = 10.0) -> None:
        """Aborts an open transaction, flushes and closes. Raises `LogUnavailable` if a record is not acknowledged."""


class TransactionalProducer(Producer, Protocol):
    """A producer whose records and consumer offsets become visible together or never. One thread at a time.

    Each call raises `LogUnavailable` (retry the same call; after ``commit_transaction`` no other is allowed),
    `TransactionAborted` (call ``abort_transaction``, then begin again) or `Fenced` (stop).
    """

    def init_transactions(self, timeout_s: float) -> None:
        """Call it once, first: fences older producers with the same transactional id and ends their transactions."""

    def begin_transaction(self) -> None: ...

    def send_offsets(self, offsets: Mapping[Partition, int], group: Any, timeout_s: float) -> None:
        """Adds the group's next offsets. ``group`` is the consumer's ``group_metadata()`` *as taken in on_assign*:
        with newer metadata a zombie could commit another member's partition. Call ``flush`` first."""

    def commit_transaction(self, timeout_s: float) -> None: ...

    def abort_transaction(self, timeout_s: float) -> None: ...


@asynccontextmanager
async def closing(producer: Producer) -> AsyncIterator[Producer]:
    """Closes the producer after the body without blocking the event loop. Raises what ``close`` raises."""
    try:
        yield producer
    finally:
        await asyncio.to_thread(producer.close)
