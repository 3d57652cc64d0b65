"""Publishes the steps of training runs."""

from typing import Final

from millstream.producers.log.acks import send_acknowledged
from millstream.producers.log.port import Producer
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.records import TrainingStep
from millstream.schemas.wire.topics import Topics

_HEADERS: Final = {KIND_HEADER: b"step"}


async def publish_step(producer: Producer, topics: Topics, step: TrainingStep) -> None:
    """Returns when the record is acknowledged. A step that is published again counts once, as it was first."""
    await send_acknowledged(producer, topics.training, step, key=step.experiment_id, headers=_HEADERS)
