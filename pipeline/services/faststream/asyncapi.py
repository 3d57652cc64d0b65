"""The topics of a deployment and their records, as an AsyncAPI document."""

from typing import Any

from faststream.kafka import KafkaBroker
from faststream.specification import AsyncAPI

from millstream.schemas.wire.records import (
    AttemptEvent,
    Control,
    DeadLetter,
    RolloutEnd,
    RolloutTask,
    Settled,
    Span,
    TrainingStep,
    Triplet,
    Worker,
)
from millstream.schemas.wire.topics import PRIORITIES, Topics


def asyncapi_document(topics: Topics) -> str:
    """JSON. FastStream's page for it would load scripts from elsewhere into an origin that may publish and cancel."""
    broker = KafkaBroker()
    holds: dict[str, Any] = {
        **dict.fromkeys(map(topics.tasks, PRIORITIES), RolloutTask),
        topics.events: AttemptEvent | Span | RolloutEnd,
        topics.triplets: Triplet | RolloutEnd,
        topics.control: Control,
        topics.training: TrainingStep,
        topics.workers: Worker,
        topics.settled: Settled,
        topics.dead: DeadLetter,
    }
    for topic in topics.all:
        about = f"Key: {topic.key}. Partitions: {topic.partitions}, {topic.cleanup}. Avro single-object encoding."
        broker.publisher(topic.name, title=topic.name, description=about, schema=holds[topic.name])
    described = AsyncAPI(title="Millstream")
    described.add_broker(broker)
    return described.to_specification().to_json()
