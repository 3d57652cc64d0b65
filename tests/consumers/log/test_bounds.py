"""What a producer holds is bounded. Only a log that can be away needs this: nothing listens where this one points."""

import time

import pytest
from contract_helpers import note

from millstream.producers.log.kafka import KafkaProducer, ProducerPolicy
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import BufferFull, LogUnavailable

ROOM = 50
WAIT_S = 0.3


async def test_a_log_that_is_away_holds_the_sender_back_and_then_says_so() -> None:
    settings = load_settings(kafka_bootstrap_servers="127.0.0.1:1")
    producer = KafkaProducer(settings, policy=ProducerPolicy(buffer_records=ROOM, buffer_wait_s=WAIT_S))
    acks: list[tuple[Exception | None, int]] = []

    def send() -> None:
        producer.send(settings.topics.events, note("x"), partition=0, on_ack=lambda *ack: acks.append(ack))

    for _ in range(ROOM):
        send()
    began = time.monotonic()
    with pytest.raises(BufferFull, match="kafka_bootstrap_servers"):
        send()
    assert WAIT_S <= time.monotonic() - began < 20 * WAIT_S
    assert acks == []

    with pytest.raises(LogUnavailable, match=f"{ROOM} records are not acknowledged"):
        producer.flush(0.2)
    with pytest.raises(LogUnavailable):
        producer.close(0.2)
    assert [offset for _, offset in acks] == [-1] * ROOM  # each refused once: nothing is dropped silently
    assert all(error is not None for error, _ in acks)
