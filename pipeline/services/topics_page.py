"""A page that describes the topics of a deployment, as AsyncAPI."""

from typing import Any

from faststream.asgi import AsgiFastStream, AsyncAPIRoute
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
    Triplet,
    Worker,
)
from millstream.schemas.wire.topics import PRIORITIES, Topics


def topics_page(topics: Topics, path: str) -> AsgiFastStream:
    """An ASGI application with HTML at ``path`` and JSON at ``path.json``. It never connects to Kafka."""
    broker = KafkaBroker()
    holds: dict[str, Any] = {
        **dict.fromkeys(map(topics.tasks, PRIORITIES), RolloutTask),
        topics.events: AttemptEvent | Span | RolloutEnd,
        topics.triplets: Triplet | RolloutEnd,
        topics.control: Control,
        topics.workers: Worker,
        topics.settled: Settled,
        topics.dead: DeadLetter,
    }
    for topic in topics.all:
        about = f"Key: {topic.key}. Partitions: {topic.partitions}, {topic.cleanup}. Avro single-object encoding."
        broker.publisher(topic.name, title=topic.name, description=about, schema=holds[topic.name])
    page = AsyncAPIRoute(path, try_it_out_path=None)
    return AsgiFastStream(broker, asyncapi_path=page, specification=AsyncAPI(title="Millstream"))
