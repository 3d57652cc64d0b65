"""Calls become spans in the log, acknowledged."""

import asyncio
import logging
from dataclasses import dataclass

from millstream.pipeline.protocols.answers import Answer
from millstream.pipeline.proxy.attempts import ProxiedAttempt
from millstream.pipeline.proxy.spans import CallFacts, call_span
from millstream.producers.blob_store import BlobError, Blobs
from millstream.producers.log.acks import send_acknowledged
from millstream.producers.log.paced import PacedProducer, PacePolicy
from millstream.producers.log.port import Producer
from millstream.producers.log_lines import rollout_fields
from millstream.producers.supervisor import supervisor
from millstream.schemas.errors import LogError, TooLarge
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)


class NotRecorded(Exception):
    """The log did not take a call's span. The call stays counted, so its attempt is not trained on without it."""

    def __init__(self, message: str, *, too_large: bool) -> None:
        super().__init__(message)
        self.too_large = too_large


@dataclass(slots=True)
class RecordedCalls:
    """How many calls the log has taken, and has not."""

    recorded: int = 0
    unrecorded: int = 0


class Recorder:
    """Writes the spans of this proxy."""

    def __init__(self, producer: Producer, topics: Topics, blobs: Blobs, ack_s: float, counts: RecordedCalls) -> None:
        """``ack_s``: how long a span may take to be acknowledged."""
        self._producer = PacedProducer(producer, PacePolicy(timeout_s=ack_s))
        self._topic = topics.events
        self._blobs = blobs
        self._background: set[asyncio.Task[None]] = set()
        self._supervisor = supervisor()
        self._counts = counts

    @property
    def full(self) -> bool:
        """No further call can be recorded at present: the log has taken nothing for so long that its buffer is full."""
        return self._producer.full

    async def record(self, attempt: ProxiedAttempt, facts: CallFacts, answer: Answer, response_id: str) -> None:
        """Returns when the log has the call. Raises `NotRecorded`."""
        attempt.spans += 1
        span = call_span(attempt.rollout_id, attempt.attempt_id, attempt.spans, facts, answer, response_id)
        try:
            span = await self._blobs.keep(span)
            headers = {KIND_HEADER: span.kind.encode()}
            await send_acknowledged(self._producer, self._topic, span, key=attempt.rollout_id, headers=headers)
            self._counts.recorded += 1
        except (BlobError, LogError, TimeoutError) as error:
            self._counts.unrecorded += 1
            raise NotRecorded(str(error) or "time-out", too_large=isinstance(error, TooLarge)) from error

    async def try_record(self, attempt: ProxiedAttempt, facts: CallFacts, answer: Answer, response_id: str) -> None:
        """Logs it if the log does not take the call."""
        try:
            await self.record(attempt, facts, answer, response_id)
        except NotRecorded as error:
            fields = rollout_fields(attempt.rollout_id, attempt.attempt_id)
            logger.error("a call is not recorded: %s", error, extra=fields)

    def record_in_background(self, attempt: ProxiedAttempt, facts: CallFacts, answer: Answer, response_id: str) -> None:
        """For a call whose client has left. It is under way until it is recorded."""

        async def record() -> None:
            try:
                await self.try_record(attempt, facts, answer, response_id)
            except Exception:  # a fault of ours: the call stays counted, so only its attempt is not trained on
                fields = rollout_fields(attempt.rollout_id, attempt.attempt_id)
                logger.exception("a call is not recorded", extra=fields)
            finally:
                attempt.leave()

        attempt.enter()
        task = self._supervisor.job("record", record()).task
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Returns when what runs in the background is recorded."""
        if self._background:
            await asyncio.wait(self._background)
