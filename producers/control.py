"""Publishes records on the control topic. The last record of each key applies."""

import json
import time
from typing import Literal

from millstream.producers.log.acks import send_acknowledged
from millstream.producers.log.port import Producer
from millstream.schemas.control import Resources
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.records import Control
from millstream.schemas.wire.topics import Topics


async def publish_control(producer: Producer, topics: Topics, record: Control) -> None:
    """Returns when the record is acknowledged."""
    key, headers = f"{record.kind}/{record.name}", {KIND_HEADER: record.kind.encode()}
    await send_acknowledged(producer, topics.control, record, key=key, headers=headers)


def cancel_record(scope: Literal["rollout", "group", "experiment"], name: str) -> Control:
    """Cancels the tasks of a rollout, group or experiment, including those published later."""
    return Control(kind="cancel", name=f"{scope}:{name}", body="true", created_at=time.time_ns())


def pause_record(experiment_id: str, paused: bool) -> Control:
    """Pauses or resumes claiming of an experiment's tasks."""
    return Control(kind="pause", name=experiment_id, body=json.dumps(paused), created_at=time.time_ns())


async def publish_resources(producer: Producer, topics: Topics, resources: Resources) -> None:
    """Publishes a version, which becomes its experiment's latest."""
    await publish_control(producer, topics, resources.to_control())
