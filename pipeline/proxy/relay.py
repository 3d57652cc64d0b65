"""An answer on its way from a model server to the client, whole or as a stream. Pure: bytes in, bytes out.

A stream is passed on as it comes, except its beginning (before the first token, so that the call can still be retried
unnoticed) and its end (which waits until the call is recorded).
"""

from dataclasses import dataclass
from typing import Final

import orjson

from millstream.pipeline.protocols import model_version, sse
from millstream.pipeline.protocols.answers import UPSTREAM_ENDED, Answer, ChatReader, Json
from millstream.pipeline.protocols.endpoints import MALFORMED, Plan
from millstream.pipeline.protocols.openai import chunks_of
from millstream.pipeline.proxy.migration import Remainder, can_migrate, remainder_of

WEIGHT_UPDATE: Final = "a weight update ended the call"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the server's answer can't be used as it is. ``broken``: this speaks against the server."""

    message: str
    broken: bool = True


class Relay:
    """One answer. What `feed` and `flush` return counts as sent.

    ``failure`` is set as soon as the server's answer can't be used. Then the call can be retried with a new relay if
    nothing has been `sent`, else another server may be able to go on (`migrate`).
    """

    def __init__(self, plan: Plan, server: str, *, trainable: bool) -> None:
        """``server`` is its name, for errors. Raises `BadRequest`."""
        self._plan = plan
        self._server = server
        self._trainable = trainable
        self._reader = plan.reader()
        self._writer = plan.writer()
        self._events = sse.Events()
        self._early = b""  # what came before the first token
        self._held: list[bytes] = []  # the end
        self._start_version: str | None = None
        self._end_version: str | None = None
        self._version_before: str | None = None  # of the servers before this one
        self._remainder: Remainder | None = None  # what the present server was asked for, if others came before it
        self.sent = False
        self.failure: Failure | None = None

    @property
    def answer(self) -> Answer:
        """As far as it has been read."""
        return self._reader.answer

    @property
    def begun(self) -> bool:
        """The first token has come."""
        return self._reader.begun

    @property
    def version(self) -> str | None:
        """Of the weights that made the answer, as the servers said."""
        return model_version.of_answer(
            self._version_before, model_version.of_answer(self._start_version, self._end_version)
        )

    @property
    def translates(self) -> bool:
        """The client gets something else than the server's bytes."""
        return self._writer is not None

    def client_id(self) -> str:
        """The answer's id, as the client sees it."""
        answer_id = self.answer.id
        return self._writer.client_id(answer_id) if self._writer is not None and answer_id else answer_id

    def start(self, version: str | None) -> None:
        """A server begins to answer, with these weights."""
        self._start_version = version

    # --- Whole answers

    def whole(self, body: bytes, *, as_stream: bool) -> bytes:
        """What the client gets once the call is recorded; sets `failure` if the answer can't be used."""
        data = json_object(body)
        if data is None:
            self._fail(f"{self._server} answered with something that is not a JSON object: {body[:200]!r}")
            return b""
        try:
            self._reader.whole(data)
        except MALFORMED as error:
            self._malformed(error)
            return b""
        if self.answer.aborted:
            self._fail(WEIGHT_UPDATE, broken=False)
            return b""
        writer = self._writer
        if writer is None:
            return body
        if as_stream:
            return b"".join([writer.event(chunk) for chunk in chunks_of(data)]) + writer.end()
        return orjson.dumps(writer.whole(data))

    # --- Streams

    def feed(self, piece: bytes) -> bytes:
        """What the client gets now of what a piece of the stream brought; may set `failure`."""
        out, reader = b"", self._reader
        try:
            for event in self._events.feed(piece):
                passed = self._event(event)
                if reader.finished:
                    self._held.append(passed)
                else:
                    out += passed
                if self.failure is not None:
                    return out if self.sent else b""  # the reader has it: the next server goes on behind it
        except sse.EventTooLarge as error:
            self._fail(str(error))
            return b""
        if not reader.begun:
            self._early += out
            return b""
        if not out or (not self.sent and self.answer.aborted):
            return b""
        out, self._early, self.sent = self._early + out, b"", True
        return out

    def end(self) -> None:
        """The server's stream is over. Sets `failure` unless the answer is complete; an external server's error
        (``answer.error``) completes it, too."""
        answer = self.answer
        if self.failure is not None:
            return
        if not self._reader.finished:
            self._fail(UPSTREAM_ENDED)
        elif answer.aborted and (not self.sent or self._can_migrate):
            self._fail(WEIGHT_UPDATE, broken=False)
        elif answer.error and self._trainable:  # the engine may have died
            self._fail(answer.error)

    def rest(self) -> bytes:
        """What is still to be sent of a complete answer, once the call is recorded."""
        return self._early + b"".join(self._held) + (b"" if self._writer is None else self._writer.end())

    def error(self, message: str) -> bytes:
        """What is sent instead of the rest."""
        if self._writer is not None:
            return self._early + self._writer.error(message)
        return self._early + sse.event(self._plan.endpoint.error_body(message, 502), "error")

    # --- A stream that has broken

    def migrate(self) -> Remainder | None:
        """Prepares for another server to go on behind what has come; None if no server can. With ``request`` None
        nothing is missing except `rest`; else send `flush` first."""
        remainder = remainder_of(self._plan, self._reader) if self._trainable else None
        if remainder is None:
            return None
        assert isinstance(self._reader, ChatReader)
        if remainder.made > (self._remainder.made if self._remainder is not None else 0):
            self._version_before = self.version
        self._start_version = self._end_version = None
        self._reader.go_on(remainder.dropped, ended=remainder.request is None)
        self._remainder, self._events, self.failure = remainder, sse.Events(), None
        for chunk in remainder.chunks:
            self._reader.event(chunk)
            self._held.append(self._translated(chunk))
        return remainder

    def flush(self) -> bytes:
        """What was held back as the end, which it is not any more."""
        held, self._held = b"".join(self._held), []
        return held

    @property
    def _can_migrate(self) -> bool:
        return self._trainable and can_migrate(self._plan)

    # --- One event

    def _event(self, event: bytes) -> bytes:
        if event.startswith(b":"):
            for comment in sse.comments_of(event):
                if (version := model_version.in_comment(comment)) is not None:
                    self._end_version = version
        payload = sse.data_of(event)
        if not payload or payload == b"[DONE]":
            return event if self._writer is None else b""
        data = json_object(payload)
        if data is None:
            self._fail(f"{self._server} streamed something that is not JSON: {payload[:200]!r}")
            return b""
        try:
            if self._remainder is not None:
                data = self._remainder.chunk(data)
            self._reader.event(data)
        except MALFORMED as error:
            self._malformed(error)
            return b""
        return event if self._writer is None else self._translated(data)

    def _translated(self, data: Json) -> bytes:
        assert self._writer is not None
        answer = self.answer
        if answer.error:
            return b""
        if answer.aborted and self._can_migrate:  # its text counts, but not that this is the end
            choices = [{**choice, "finish_reason": None} for choice in data.get("choices") or ()]
            return self._writer.event({**data, "choices": choices}) if choices else b""
        return self._writer.event(data)

    def _fail(self, message: str, *, broken: bool = True) -> None:
        self.failure = Failure(message, broken)

    def _malformed(self, error: Exception) -> None:
        self._fail(f"{self._server} answered in a form that {self._plan.path} does not have: {error!r}")


def json_object(text: bytes) -> Json | None:
    """None if it is anything else."""
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
