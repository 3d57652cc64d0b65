"""Dead letters: records that a role could not use, kept unchanged with the reason, and replayed once that is fixed."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.producers.log.acks import Acks, send_acknowledged
from millstream.producers.log.port import Producer
from millstream.producers.tasks import TaskPublisher
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import CodecError, ConfigError, TooLarge
from millstream.schemas.ids import new_id
from millstream.schemas.redaction import without_passwords
from millstream.schemas.spans.text import cut
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import KIND_HEADER, ROLLOUT_HEADER, LogRecord, Partition
from millstream.schemas.wire.records import DeadLetter, Record, RolloutTask
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)


def dead_letter(record: LogRecord, role: str, reason: str, error: str) -> DeadLetter:
    """The dead letter of a record. ``reason`` is short, for grouping; ``error`` is the exact cause."""
    return DeadLetter(
        topic=record.partition.topic,
        partition=record.partition.number,
        offset=record.offset,
        key=None if record.key is None else record.key.encode("utf-8", "surrogateescape"),
        value=_encoded(record.value),
        headers=record.headers,
        timestamp=record.timestamp,
        role=role,
        reason=reason,
        error=cut(without_passwords(error)),
        time=time.time_ns(),
    )


def _encoded(value: bytes | Record) -> bytes:
    """Empty if it is a record in memory that can't be encoded: its error says why."""
    try:
        return value if isinstance(value, bytes) else codec.encode(value)
    except CodecError:
        return b""


def send_dead_letter(send: Callable[..., None], topics: Topics, letter: DeadLetter) -> None:
    """Sends a letter (by `Producer.send` or `Acks.send`) to the dead-letter topic under its original key. A letter
    that is too large goes without its body; it names the position of the original, which stays in its topic."""
    headers = {KIND_HEADER: letter.reason.encode()}
    try:
        send(topics.dead, letter, key=letter_key(letter), headers=headers)
    except TooLarge:
        send(topics.dead, without_body(letter), key=letter_key(letter), headers=headers)


async def write_dead_letter(producer: Producer, topics: Topics, letter: DeadLetter) -> None:
    """Returns when the letter is stored, without its body if the brokers find that too large. Raises `LogError`."""
    for each in (letter, without_body(letter)):
        sending = Acks(producer)
        send_dead_letter(sending.send, topics, each)
        try:
            await sending.wait()
            return
        except TooLarge:
            if each.value is None:
                raise


def without_body(letter: DeadLetter) -> DeadLetter:
    return replace(letter, value=None, headers={})


def letter_key(letter: DeadLetter) -> str | None:
    """The original key as text."""
    return None if letter.key is None else letter.key.decode(errors="replace")


async def read_dead_letters(log: Log, topics: Topics) -> AsyncIterator[tuple[LogRecord, DeadLetter]]:
    """All dead letters in the topic now, with their records. Raises `LogUnavailable`."""
    partitions = [Partition(topics.dead, number) for number in range(topics.dead_partitions)]
    async with aclosing(read_to_end(log, partitions)) as records:
        async for record in records:
            try:
                yield record, codec.decode_as(DeadLetter, record.value)
            except CodecError as error:
                logger.warning("%s is not a dead letter: %s", record.place, error)


async def list_dead_letters(
    log: Log, topics: Topics, reason: str | None = None, role: str | None = None
) -> list[tuple[LogRecord, DeadLetter]]:
    """As `read_dead_letters`, of one reason and of one role, if given."""
    return [
        (record, letter)
        async for record, letter in read_dead_letters(log, topics)
        if reason in (None, letter.reason) and role in (None, letter.role)
    ]


async def find_dead_letters(log: Log, topics: Topics, places: Sequence[str]) -> list[DeadLetter]:
    """The dead letters at these places. Raises `ConfigError` naming those that are not there."""
    found = {letter_place(record): letter async for record, letter in read_dead_letters(log, topics)}
    if missing := [place for place in places if place not in found]:
        raise ConfigError(f"no dead letter at {', '.join(missing)}; see `millstream dead list` (partition:offset)")
    return [found[place] for place in places]


def letter_place(record: LogRecord) -> str:
    """Where a dead letter is on its topic: ``partition:offset``."""
    return f"{record.partition.number}:{record.offset}"


def readable(body: bytes | None) -> Any:
    """The fields of a record; else its bytes as text."""
    if body is None:
        return None
    try:
        fields = asdict(codec.decode(body))
    except CodecError:
        return body.decode(errors="backslashreplace")
    return {n: v.decode(errors="backslashreplace") if isinstance(v, bytes) else v for n, v in fields.items()}


async def replay(producer: Producer, settings: Settings, letter: DeadLetter) -> str:
    """Sends the record of a dead letter again; returns a description of what was done.

    The task of a failed rollout becomes a new rollout, with fresh budgets and without saved state, because the end of
    the old one is final; its metadata name it (``replay_of``). So does a task that a runner has refused, and ended: its
    header names the rollout. Any other record goes to its topic unchanged.
    Raises `ConfigError` if the letter can't be replayed.
    """
    if letter.value is None:
        raise ConfigError(f"the record was kept without its body ({letter.reason}): it can't be sent again")
    if letter.role == "sink":
        raise ConfigError(
            f"the sink alone refused this record; the other roles have read it at {letter.topic}[{letter.partition}]"
            f"@{letter.offset}, and would take it for another one"
        )
    refused = letter.role == "runner" and ROLLOUT_HEADER in letter.headers
    if refused or (letter.role == "adapter" and letter.reason != "undecodable"):
        try:
            ended = codec.decode_as(RolloutTask, letter.value)
        except CodecError as error:
            raise ConfigError(f"the task still can't be read: {error}") from error
        task = replace(
            ended,
            rollout_id=new_id(),
            attempt=1,
            lost_attempts=0,
            state=None,
            metadata={**ended.metadata, "replay_of": ended.rollout_id},
            created_at=time.time_ns(),
        )
        await TaskPublisher(producer, settings).publish([task])
        return f"rollout {ended.rollout_id} is run again as {task.rollout_id}"
    key = None if letter.key is None else letter.key.decode("utf-8", "surrogateescape")
    offset = await send_acknowledged(producer, letter.topic, letter.value, key=key, headers=letter.headers)
    return f"sent to {letter.topic} as it was, at offset {offset} of its partition"
