"""Dead letters: what a role can't use is kept, as it was, with the reason."""

import time
from dataclasses import replace

from millstream.producers.port import OnAck, Producer
from millstream.schemas import codec
from millstream.schemas.errors import TooLarge
from millstream.schemas.log import KIND_HEADER, LogRecord
from millstream.schemas.records import DeadLetter
from millstream.schemas.topics import Topics


def dead_letter(record: LogRecord, role: str, reason: str, error: str) -> DeadLetter:
    """A record as its dead letter. ``reason`` is short, for grouping; ``error`` says what exactly was wrong."""
    return DeadLetter(
        topic=record.partition.topic,
        partition=record.partition.number,
        offset=record.offset,
        key=None if record.key is None else record.key.encode("utf-8", "surrogateescape"),
        value=record.value if isinstance(record.value, bytes) else codec.encode(record.value),
        headers=record.headers,
        timestamp=record.timestamp,
        role=role,
        reason=reason,
        error=error,
        time=time.time_ns(),
    )


def send_dead_letter(producer: Producer, topics: Topics, letter: DeadLetter, on_ack: OnAck | None = None) -> None:
    """Sends it to the dead-letter topic under its original key; without its body if there is no room for both."""
    headers = {KIND_HEADER: letter.reason.encode()}
    try:
        producer.send(topics.dead, letter, key=letter_key(letter), headers=headers, on_ack=on_ack)
    except TooLarge:
        bare = replace(letter, value=None, headers={})
        producer.send(topics.dead, bare, key=letter_key(letter), headers=headers, on_ack=on_ack)


def letter_key(letter: DeadLetter) -> str | None:
    """The original key as text."""
    return None if letter.key is None else letter.key.decode(errors="replace")
