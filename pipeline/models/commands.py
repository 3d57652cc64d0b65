"""Sends commands to the servers of a model and waits for their answers; reads what they have reported."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from millstream.consumers.control import ControlFollower
from millstream.consumers.log.port import Log
from millstream.producers.control import publish_control
from millstream.producers.log.port import closing
from millstream.schemas.control import ModelAnswer, ModelCommand, ServerState
from millstream.schemas.errors import MillstreamError
from millstream.schemas.wire.records import Control
from millstream.schemas.wire.topics import Topics


class ModelControl:
    """What the control topic says about models."""

    def __init__(self, log: Log, topics: Topics) -> None:
        self.follower = ControlFollower(log, topics, on_control=self._on_control)
        self.servers: dict[str, ServerState] = {}
        self.answers: dict[str, ModelAnswer] = {}
        self.changed = asyncio.Event()

    def _on_control(self, record: Control) -> None:
        if record.kind == ServerState.kind:
            self.servers[record.name] = ServerState.from_control(record)
        elif record.kind == ModelAnswer.kind:
            self.answers[record.name] = ModelAnswer.from_control(record)
        self.changed.set()


async def answered(log: Log, topics: Topics, command: ModelCommand, wait_s: float) -> ModelAnswer:
    """Publishes a command and returns its result. Raises `MillstreamError` if no server answers."""
    async with _following(log, topics) as control, closing(log.producer()) as producer:
        known = sorted(state.model for state in control.servers.values())
        if command.model not in known:
            raise MillstreamError(f"no server serves {command.model}; served are: {', '.join(known) or 'none'}")
        await publish_control(producer, topics, command.to_control())
        try:
            async with asyncio.timeout(wait_s):
                while command.command_id not in control.answers:
                    control.changed.clear()
                    await control.changed.wait()
        except TimeoutError:
            raise MillstreamError(
                f"no answer within {wait_s:g} s; the server carries the command out when it is back"
            ) from None
    return control.answers[command.command_id]


async def read_models(log: Log, topics: Topics) -> ModelControl:
    """What the topic holds now."""
    async with _following(log, topics) as control:
        return control


@asynccontextmanager
async def _following(log: Log, topics: Topics) -> AsyncIterator[ModelControl]:
    """Has read what the control topic holds, and follows it."""
    control = ModelControl(log, topics)
    try:
        await control.follower.start()
        yield control
    finally:
        await control.follower.close()
