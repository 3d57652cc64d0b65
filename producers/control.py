"""Publishing what everybody follows: records on the control topic, of which the last one of each key holds."""

import json
import time

from millstream.producers.port import Producer, send_acknowledged
from millstream.schemas.log import KIND_HEADER
from millstream.schemas.records import Control
from millstream.schemas.resources import Resources
from millstream.schemas.topics import Topics


async def publish_control(producer: Producer, topics: Topics, record: Control) -> None:
    """Returns when the log has acknowledged it."""
    key, headers = f"{record.kind}/{record.name}", {KIND_HEADER: record.kind.encode()}
    await send_acknowledged(producer, topics.control, record, key=key, headers=headers)


async def publish_resources(producer: Producer, topics: Topics, resources: Resources) -> None:
    """Announces a version: from now on it is the latest of its experiment."""
    await publish_control(producer, topics, resources.to_control(time.time_ns()))


async def publish_cancel(producer: Producer, topics: Topics, scope: str, name: str) -> None:
    """Cancels what is published of a rollout, group or experiment (``scope``), and what still will be."""
    body = json.dumps({"scope": scope, "id": name})
    record = Control(kind="cancel", name=f"{scope}:{name}", body=body, created_at=time.time_ns())
    await publish_control(producer, topics, record)


async def publish_pause(producer: Producer, topics: Topics, experiment_id: str, paused: bool) -> None:
    """Stops the claims of an experiment's tasks, or lets them go on."""
    body = json.dumps({"scope": "experiment", "id": experiment_id, "paused": paused})
    record = Control(kind="pause", name=f"experiment:{experiment_id}", body=body, created_at=time.time_ns())
    await publish_control(producer, topics, record)
