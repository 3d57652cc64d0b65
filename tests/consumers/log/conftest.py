"""The logs that the contract tests run against: in memory, in memory with encoding, and Kafka (a real broker)."""

from collections.abc import AsyncIterator, Callable
from uuid import uuid4

import pytest
from contract_helpers import MAX_RECORD_BYTES, PARTITIONS, LogUnderTest, Member, Ownership

from millstream.consumers.log.port import Log
from millstream.schemas.wire.topics import Topics


@pytest.fixture(params=["memory", "memory-encoded", pytest.param("kafka", marks=pytest.mark.kafka)])
async def log(request: pytest.FixtureRequest) -> AsyncIterator[LogUnderTest]:
    made: Log
    if request.param == "kafka":
        from millstream.consumers.log.kafka_log import KafkaLog

        settings = request.getfixturevalue("kafka_settings")(
            kafka_partitions=PARTITIONS, max_record_bytes=MAX_RECORD_BYTES
        )
        topics, made = settings.topics, KafkaLog(settings)
    else:
        from millstream.consumers.log.memory_log import MemoryLog

        topics = Topics(f"t{uuid4().hex[:8]}", PARTITIONS)
        made = MemoryLog(topics, encode=request.param == "memory-encoded", max_record_bytes=MAX_RECORD_BYTES)
    await made.create_topics()
    under_test = LogUnderTest(request.param, made, topics)
    yield under_test
    await under_test.close()


# On Kafka the two kinds of consumer are two clients: aiokafka, and confluent-kafka for those that take part in
# transactions.
@pytest.fixture(params=["plain", "transactional"])
def new_member(request: pytest.FixtureRequest, log: LogUnderTest) -> Callable[[], Member]:
    """Makes members of one group, of one kind, whose ownerships must never overlap."""
    ownership = Ownership()
    make = log.consumer if request.param == "plain" else log.transactional_consumer
    return lambda: Member(make("team"), ownership)
