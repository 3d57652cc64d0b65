"""Writes one attempt to ``events``: running, spans, heartbeats, and its end after all of them."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from millstream.consumers.dead_letters import dead_letter, send_dead_letter
from millstream.consumers.runner.claims import ROLE, Claim
from millstream.consumers.runner.outcome import Outcome, stopped_by
from millstream.producers.blob_store import BlobError, Blobs
from millstream.producers.log.acks import Acks
from millstream.producers.log.port import Producer
from millstream.producers.log_lines import rollout_fields
from millstream.schemas.errors import CodecError, LogError, TooLarge
from millstream.schemas.spans import semconv
from millstream.schemas.spans.blobs import kept_apart
from millstream.schemas.wire import status
from millstream.schemas.wire.log import KIND_HEADER, LogRecord, Partition
from millstream.schemas.wire.records import AttemptEvent, Span
from millstream.schemas.wire.topics import Topics, partition_of

logger = logging.getLogger(__name__)

_HEADERS = {
    kind: {KIND_HEADER: kind.encode()}
    for kind in (*semconv.KIND_OF_OPERATION.values(), semconv.SPAN, semconv.ALERT, *status.TRANSITIONS)
    if kind is not None
}


class _Waiting(NamedTuple):
    span: Span | bytes
    kind: str
    needed: "list[Future[None]]"


class AttemptWriter:
    """Call ``started``, ``content``, ``span``, ``save_state`` and ``calling`` from any thread, the rest on one event
    loop."""

    def __init__(
        self,
        claim: Claim,
        producer: Producer,
        topics: Topics,
        worker_id: str,
        blobs: Blobs,
        *,
        on_dead_letter: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        """``on_dead_letter`` is called with the reason of each."""
        self.claim = claim
        self.began = time.monotonic()
        self._on_dead_letter = on_dead_letter
        self.verdict: Outcome | None = None  # the runner's decision; it overrules the agent's side
        self.proxy_url = self.proxy_key = ""  # of its model calls
        self.last_acknowledged = time.monotonic()  # when the last acknowledged heartbeat was sent
        self._last_sign = self.last_acknowledged
        self._calling = False
        self._spans = Acks(producer)
        self._states = Acks(producer)
        self._producer = producer
        self._topics = topics
        self._worker_id = worker_id
        self._refused: Outcome | None = None  # set if a span could not be written
        self._blobs = blobs
        self._contents: dict[str, Future[None]] = {}  # by digest: received from the agent's side
        self._waiting: deque[_Waiting] = deque()  # spans whose contents, or whose predecessors', are not stored yet
        self._sealed = self._ended = False
        self._late: list[_Waiting] = []  # spans that came between the agent's end and the terminal event
        self._order = threading.RLock()  # of spans
        self._lock = threading.Lock()  # the terminal event counts the spans before it: no span in between

    @cached_property
    def outcome(self) -> "asyncio.Future[Outcome]":
        """How the agent's side ended."""
        return asyncio.get_running_loop().create_future()

    @property
    def name(self) -> str:
        return f"attempt {self.claim.attempt_id} of rollout {self.claim.task.rollout_id}"

    @property
    def fields(self) -> dict[str, str]:
        """Of its log lines."""
        return rollout_fields(self.claim.task.rollout_id, self.claim.attempt_id)

    @property
    def spans(self) -> int:
        """Received so far."""
        with self._order:  # not while a span moves from waiting to sent
            return self._spans.sent + len(self._waiting)

    @property
    def pending(self) -> int:
        """Spans not acknowledged yet."""
        return self._spans.pending + len(self._waiting)

    @property
    def pending_bytes(self) -> int:
        """Of contents not stored yet, of all attempts of this process."""
        return self._blobs.pending_bytes

    @property
    def silent_s(self) -> float:
        """How long the agent has shown no activity: no span, no state, no model call in progress."""
        return 0.0 if self._calling else time.monotonic() - self._last_sign

    def calling(self, calling: bool) -> None:
        """A model call begins, or the last one has ended."""
        self._calling, self._last_sign = calling, time.monotonic()

    def started(self) -> None:
        """The agent's side begins."""
        self._last_sign = time.monotonic()
        self.heartbeat()

    def heartbeat(self) -> None:
        """Repeats ``running``. Its acknowledgement updates ``last_acknowledged``."""
        sent_at = time.monotonic()

        def on_ack(error: Exception | None, offset: int) -> None:
            if error is None:
                self.last_acknowledged = max(self.last_acknowledged, sent_at)

        try:
            self._producer.send(
                self._topics.events,
                self._event(status.RUNNING),
                key=self.claim.task.rollout_id,
                headers=_HEADERS[status.RUNNING],
                on_ack=on_ack,
            )
        except LogError as error:
            logger.warning("heartbeat not sent: %s", error, extra=self.fields)

    def content(self, digest: str, content: bytes) -> None:
        """A long content that spans will refer to. It is stored in the background."""
        self._last_sign = time.monotonic()
        self._contents[digest] = self._blobs.put(digest, content)

    def emit(self, span: Span) -> None:
        """A finished span of this process. Long contents are stored apart."""
        span, contents = kept_apart(span)
        for digest, content in contents.items():
            self.content(digest, content)
        self.span(span, span.kind, contents)

    def span(self, span: Span | bytes, kind: str, contents: Iterable[str] = ()) -> None:
        """A finished span, and the digests of its contents: it is written after them, and later spans after it. If the
        log refuses it, or its contents can't be stored, the attempt fails once the agent has ended."""
        self._last_sign = time.monotonic()
        with self._order:
            if self._sealed:
                late = _Waiting(span, kind, [self._contents[digest] for digest in contents])
                if self._ended:
                    self._send_late(late)
                else:
                    self._late.append(late)
                return
            if not contents and not self._waiting:
                self._send(span, kind)
                return
            needed = [self._contents[digest] for digest in contents]
            self._waiting.append(_Waiting(span, kind, needed))
        for stored in needed:
            stored.add_done_callback(lambda _: self._send_waiting())
        self._send_waiting()

    def _send_waiting(self) -> None:
        """Sends the spans whose contents are stored."""
        with self._order:
            while self._waiting and all(stored.done() for stored in self._waiting[0].needed):
                waiting = self._waiting.popleft()
                try:
                    for stored in waiting.needed:
                        stored.result()
                except (BlobError, CancelledError) as error:
                    self.refuse("blob", str(error) or "the runner was stopped")
                else:
                    self._send(waiting.span, waiting.kind)

    async def _stored(self) -> None:
        """Waits until all spans are sent."""
        with self._order:
            needed = [stored for waiting in self._waiting for stored in waiting.needed]
        if needed:
            await asyncio.to_thread(wait, needed, self._blobs.policy.store_s)
        self._send_waiting()
        if self._waiting:
            limit_s = self._blobs.policy.store_s
            self.refuse("blob", f"its content was not stored in {self._blobs.url} within {limit_s:g} s")

    def _send(self, span: Span | bytes, kind: str) -> None:
        try:
            with self._lock:
                self._spans.send(self._topics.events, span, key=self.claim.task.rollout_id, headers=_HEADERS[kind])
        except TooLarge as error:
            self.refuse("too_large", str(error))
            self._dead_letter(str(error))
        except CodecError as error:
            self.refuse("undecodable", str(error))
        except LogError as error:
            self._refused = stopped_by(status.LOST, type(error).__name__, f"a span was not written: {error}")

    def save_state(self, state: bytes) -> None:
        """The agent's checkpoint, for the next attempt. One that is not written fails this attempt."""
        self._last_sign = time.monotonic()
        try:
            with self._lock:
                event = self._event(status.RUNNING, state=state)
                headers = _HEADERS[status.RUNNING]
                self._states.send(self._topics.events, event, key=event.rollout_id, headers=headers)
        except TooLarge as error:
            self.refuse("too_large", str(error), "the agent's state")
        except CodecError as error:
            self.refuse("not_encodable", str(error), "the agent's state")
        except LogError as error:
            self._refused = stopped_by(status.LOST, type(error).__name__, f"a state was not written: {error}")

    def refuse(self, error_type: str, message: str, what: str = "a span") -> None:
        """Something can't be recorded, so the attempt fails: training on an incomplete trace would be worse."""
        self._refused = stopped_by(status.FAILED, error_type, f"{what} can't be recorded: {message}")

    def seal(self) -> int:
        """The agent has ended: what comes from now on is late. It is written after the terminal event, and not counted.
        Returns the number of spans so far."""
        with self._order:
            self._sealed = True
            return self.spans

    def _send_late(self, late: _Waiting) -> None:
        """Writes a late span, at once: it is not trained on, and may precede its contents."""
        try:
            self._producer.send(
                self._topics.events, late.span, key=self.claim.task.rollout_id, headers=_HEADERS[late.kind]
            )
        except (CodecError, LogError) as error:
            logger.warning("a late span is not recorded: %s", error, extra=self.fields)

    def end(self, outcome: Outcome) -> None:
        """The agent's side has ended. Only the first call counts."""
        self.seal()
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    async def finish(self, outcome: Outcome, proxy_spans: int | None) -> Outcome:
        """Waits until every span is acknowledged, then writes the terminal event and waits for that.
        Returns the final outcome. ``proxy_spans``: how many the proxy has written, None without one.

        Raises `LogError` if the terminal event was not written: the attempt then ends with its lease.
        """
        await self._stored()
        outcome = self._refused or self._verdict_over(outcome)
        if outcome.spans is not None and outcome.spans != self.spans and outcome.status == status.SUCCEEDED:
            outcome = stopped_by(status.LOST, "spans", f"the agent made {outcome.spans} spans, {self.spans} arrived")
        try:
            await self._spans.wait()
            await self._states.wait()
        except TooLarge as error:  # for the topic's own limit
            outcome = stopped_by(status.FAILED, "too_large", f"a span or state can't be recorded: {error}")
            self._dead_letter(str(error))
        except LogError as error:
            outcome = stopped_by(status.LOST, type(error).__name__, f"a span or state was not written: {error}")
        try:
            await self._send_end(outcome, proxy_spans)
        except (TooLarge, CodecError) as error:
            reason = "too_large" if isinstance(error, TooLarge) else "not_encodable"
            outcome = stopped_by(status.FAILED, reason, f"what the agent returned can't be recorded: {error}")
            await self._send_end(outcome, proxy_spans)
        return outcome

    async def _send_end(self, outcome: Outcome, proxy_spans: int | None) -> None:
        terminal = Acks(self._producer)
        with self._lock:
            counts = {semconv.SOURCE_AGENT: self._spans.sent}
            if proxy_spans is not None:
                counts[semconv.SOURCE_PROXY] = proxy_spans
            event, headers = self._event(outcome.status, outcome, counts), _HEADERS[outcome.status]
            terminal.send(self._topics.events, event, key=event.rollout_id, headers=headers)
        with self._order:
            self._ended = True
            for late in self._late:
                self._send_late(late)
            self._late.clear()
        await terminal.wait()

    def _verdict_over(self, outcome: Outcome) -> Outcome:
        if self.verdict is None:
            return outcome
        if self.verdict.error is not None and outcome.error is not None:  # where the agent was then
            return replace(self.verdict, error=replace(self.verdict.error, stack=outcome.error.stack))
        return self.verdict

    def _event(
        self,
        new: str,
        outcome: Outcome | None = None,
        span_counts: Mapping[str, int] | None = None,
        state: bytes | None = None,
    ) -> AttemptEvent:
        task = self.claim.task
        return AttemptEvent(
            rollout_id=task.rollout_id,
            attempt_id=self.claim.attempt_id,
            attempt=task.attempt,
            status=new,
            worker_id=self._worker_id,
            time=time.time_ns(),
            lease_s=task.lease_s,
            error=None if outcome is None else outcome.error,
            output=None if outcome is None else outcome.output,
            span_counts=span_counts or {},
            state=state,
            metadata={} if outcome is None else outcome.metadata,
        )

    def _dead_letter(self, error: str) -> None:
        """Writes the dead letter of a span too large for any topic, without its body."""
        key = self.claim.task.rollout_id
        place = Partition(self._topics.events, partition_of(key, self._topics.partitions))
        record = LogRecord(place, -1, time.time_ns() // 1_000_000, key, b"")
        letter = replace(dead_letter(record, ROLE, "too_large", f"a span of {self.name}: {error}"), value=None)
        try:
            send_dead_letter(self._producer.send, self._topics, letter)
            self._on_dead_letter(letter.reason)
        except LogError as failure:
            logger.error("no dead letter could be written: %s", failure, extra=self.fields)
