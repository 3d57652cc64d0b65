"""Steps of training on the log."""

import math

from millstream.consumers.log.memory_log import MemoryLog
from millstream.producers.training import publish_step
from millstream.schemas.wire import codec
from millstream.schemas.wire.records import TrainingStep
from millstream.schemas.wire.topics import Topics


async def test_a_step_lies_on_its_topic_under_its_experiment() -> None:
    topics = Topics("t", 4)
    log = MemoryLog(topics, encode=True)
    step = TrainingStep(experiment_id="e", step=1, started_at=1, ended_at=2, metrics={"kl": math.inf}, trained=("r",))
    await publish_step(log.producer(), topics, step)
    ((record,),) = [part.records for part in log.partitions[topics.training]]
    assert (record.key, record.headers) == ("e", {"kind": b"step"})
    assert codec.decode(record.value) == step
    assert topics.training in {topic.name for topic in topics.stored}
