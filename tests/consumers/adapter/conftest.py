"""The logs that adapters are tested on."""

import pytest
from adapter_rig import Bed

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.consumers.log.memory_log import MemoryLog
from millstream.schemas.wire.topics import Topics


@pytest.fixture(params=["live", "encoded", pytest.param("kafka", marks=pytest.mark.kafka)])
async def bed(request):
    if request.param != "kafka":
        topics = Topics("t", partitions=4)
        return Bed(MemoryLog(topics, encode=request.param == "encoded"), topics)
    settings = request.getfixturevalue("kafka_settings")()
    log = KafkaLog(settings)
    await log.create_topics()
    return Bed(log, settings.topics)
