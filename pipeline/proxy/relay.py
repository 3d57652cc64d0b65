"""An answer on its way from a model server to the client, whole or as a stream. Pure: bytes in, bytes out.

A stream is passed on as it comes, except its end, which waits until the call is recorded. What the proxy reads, it
reads from a copy: an answer that it does not understand is passed on all the same, and its record says why it can't be
trained on. Only a translation needs to understand what it translates.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from millstream.pipeline.protocols import model_version, sse
from millstream.pipeline.protocols.answers import UPSTREAM_ENDED, Answer, ChatReader, Json
from millstream.pipeline.protocols.endpoints import MALFORMED, Plan
from millstream.pipeline.protocols.json_text import dumps, loads_object
from millstream.pipeline.protocols.openai import chunks_of
from millstream.pipeline.proxy.migration import Remainder, can_migrate, remainder_of
from millstream.schemas.wire.versions import MIXED, Versions, from_text, joined

WEIGHT_UPDATE: Final = "a weight update ended the call"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the server's answer can't be used as it is. ``broken``: this speaks against the server."""

    message: str
    broken: bool = True


class Relay:
    """One answer. What `feed` and `flush` return counts as sent.

    ``failure`` is set as soon as the server's answer can't be used. Then the call can be retried (`restart`) as long as
    the client has not got a part of the answer itself, else another server may be able to go on (`migrate`).
    """

    def __init__(self, plan: Plan, server: str, *, trainable: bool) -> None:
        """``server`` is its name, for errors. Raises `BadRequest`."""
        self._plan = plan
        self._server = server
        self._trainable = trainable
        self._writer = plan.writer()
        self._reader = plan.reader()
        self._events = sse.Events()
        self._unread = False  # the rest of the stream is passed on without being read
        self._done = False  # the server has said that the stream is over
        self._held: list[bytes] = []  # the end
        self._start_version: str | None = None
        self._end_version: str | None = None
        self._version_before: str | None = None  # of the servers before this one
        self._noted: list[tuple[int, str]] = []  # (tokens of the answer so far, version that the server named then)
        self._ranges: str | None = None  # versions of its own tokens, as the server said at the end
        self._remainder: Remainder | None = None  # what the present server was asked for, if others came before it
        self._head_read = False  # something other than pings and comments
        self._head_sent = False
        self._head_id: str | None = None  # of the answer whose head was sent, although its server failed behind it
        self.sent = False
        self.failure: Failure | None = None

    def restart(self) -> None:
        """Another server answers from the beginning. A head that has been sent is not sent again."""
        if not self._head_sent:
            self._writer = self._plan.writer()
        elif self._head_id is None:
            self._head_id = self.answer.id
        self._reader, self._events, self._held = self._plan.reader(), sse.Events(), []
        self._start_version = self._end_version = self._ranges = self.failure = None
        self._noted = []
        self._unread = self._done = self._head_read = False

    @property
    def answer(self) -> Answer:
        """As far as it has been read."""
        return self._reader.answer

    @property
    def begun(self) -> bool:
        """The first token has come."""
        return self._reader.begun

    @property
    def committed(self) -> bool:
        """The client has a part of the answer itself, so that another answer can't replace it."""
        return self.sent and self._reader.begun

    @property
    def version(self) -> str | None:
        """Of the weights that made the answer, as the servers said."""
        said = model_version.of_answer(
            self._version_before, model_version.of_answer(self._start_version, self._end_version)
        )
        return MIXED if len(self.versions) > 1 else said

    @property
    def versions(self) -> Versions:
        """Of the weights that made the answer's tokens, as the server said of each token; else by the comments in its
        stream, exact to one piece of it. Empty if it is not known."""
        found, made = self._noted_versions(), len(self.answer.token_ids or ())
        if not found or found[0][0] != 0 or found[-1][0] >= made:
            return ()
        return () if any(version in ("", MIXED) for _, version in found) else found

    def _noted_versions(self) -> Versions:
        before = 0 if self._remainder is None else self._remainder.made
        if self._ranges is not None:
            with suppress(ValueError):  # of a server that counts in another way
                own = from_text(self._ranges, len(self.answer.token_ids or ()) - before)
                others = [each for each in self._noted if each[0] < before]
                return joined([*others, *((before + first, version) for first, version in own)])
        return joined(self._noted)

    @property
    def translates(self) -> bool:
        """The client gets something else than the server's bytes."""
        return self._writer is not None

    def client_id(self) -> str:
        """The answer's id, as the client sees it."""
        answer_id = self.answer.id
        return self._writer.client_id(answer_id) if self._writer is not None and answer_id else answer_id

    def start(self, version: str | None, ranges: str | None = None) -> None:
        """A server begins to answer, with these weights; ``ranges``: which of them made which tokens, if it is over."""
        self._start_version, self._ranges = version, ranges
        self._noted.append((0 if self._remainder is None else self._remainder.made, version or ""))

    # --- Whole answers

    def whole(self, body: bytes, *, as_stream: bool) -> bytes:
        """What the client gets once the call is recorded; sets `failure` if the answer can't be used."""
        writer, data = self._writer, loads_object(body)
        if data is None:
            what = f"something that is not a JSON object: {body[:200]!r}"
            if writer is None:
                self.answer.blemish(f"the server answered with {what}")
                return body
            self._fail(f"{self._server} answered with {what}")
            return b""
        try:
            self._reader.whole(data)
        except MALFORMED as error:
            self._flaw(error)
        if self.answer.aborted:
            self._fail(WEIGHT_UPDATE, broken=False)
            return b""
        if writer is None:
            return body
        if writer.strict and self.answer.error:
            self._fail(self.answer.error, broken=False)
            return b""
        try:
            if as_stream:
                return b"".join([writer.event(chunk) for chunk in chunks_of(data)]) + writer.end()
            return dumps(writer.whole(data))
        except MALFORMED as error:
            if not writer.strict and not as_stream:
                return body
            self._malformed(error)
            return b""

    # --- Streams

    def feed(self, piece: bytes) -> bytes:
        """What the client gets now of what a piece of the stream brought; may set `failure`."""
        if self._unread:
            return piece
        out, reader = b"", self._reader
        try:
            events = self._events.feed(piece)
        except sse.EventTooLarge as error:
            if self._writer is not None:
                self._fail(str(error))
                return b""
            self.answer.blemish(str(error))
            self._unread = self.sent = True
            return self._events.rest()
        for event in events:
            passed = self._event(event)
            if reader.finished or self._done:
                self._held.append(passed)
            else:
                out += passed
            if self.failure is not None:
                break
        unsure = self.failure is not None and not self.sent
        if not out or unsure or (self.answer.aborted and not (self.sent and reader.begun)):
            return b""
        self.sent, self._head_sent = True, self._head_sent or self._head_read
        return out

    def end(self) -> None:
        """The server's stream is over. Sets `failure` unless the answer is complete; an external server's error
        (``answer.error``) completes it, too."""
        answer = self.answer
        if self.failure is None and (rest := self._events.rest()):
            self._held.append(self._event(rest))
        if self.failure is not None or self._unread:
            return
        finished = self._reader.finished
        if not finished and not (self._done and (self.begun or not self._trainable)):
            self._fail(UPSTREAM_ENDED)
        elif answer.aborted and (not self.committed or self._can_migrate):
            self._fail(WEIGHT_UPDATE, broken=False)
        elif answer.error and self._trainable:  # the engine may have died
            self._fail(answer.error)
        elif not finished:
            answer.blemish("the server gave no finish reason")

    def rest(self) -> bytes:
        """What is still to be sent of a complete answer, once the call is recorded."""
        return b"".join(self._held) + (b"" if self._writer is None else self._writer.end())

    def error(self, message: str) -> bytes:
        """What is sent instead of the rest. The server's own report of its error is passed on as it is."""
        if self._writer is not None:
            return self._writer.error(message)
        if self._held and self.failure is None and message == self._reader.answer.error:
            return b"".join(self._held)
        return sse.event(self._plan.endpoint.error_body(message, 502), "error")

    # --- A stream that has broken

    def migrate(self) -> Remainder | None:
        """Prepares for another server to go on behind what has come; None if no server can. With ``request`` None
        nothing is missing except `rest`; else send `flush` first."""
        remainder = remainder_of(self._plan, self._reader) if self._trainable and not self.answer.flaw else None
        if remainder is None:
            return None
        assert isinstance(self._reader, ChatReader)
        if remainder.made > (self._remainder.made if self._remainder is not None else 0):
            self._version_before = self.version
        self._noted = [each for each in self._noted_versions() if each[0] < remainder.made]
        self._start_version = self._end_version = self._ranges = None
        self._reader.go_on(remainder.dropped, ended=remainder.request is None)
        self._remainder, self._events, self.failure = remainder, sse.Events(), None
        self._done = False
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
        writer, comments = self._writer, b""
        if not event.startswith(b"data: "):  # nearly all do
            comments = self._comments(event)
        payload = sse.data_of(event)
        if not payload or payload == b"[DONE]":
            self._done = self._done or bool(payload)
            return event if writer is None else comments
        data = loads_object(payload)
        if data is None:
            what = f"{self._server} streamed something that is not JSON: {payload[:200]!r}"
            if writer is not None:
                self._fail(what)
                return b""
            self.answer.blemish(what)
            return event
        try:
            if self._remainder is not None:
                data = self._remainder.chunk(data)
        except MALFORMED as error:
            self._malformed(error)
            return b""
        try:
            self._reader.event(data)
        except MALFORMED as error:
            self._flaw(error)
        ping = not self._reader.begun and data.get("type") == "ping"
        self._head_read = self._head_read or not ping
        if self._head_id is not None:
            if not (ping or self._reader.begun or self.answer.error):
                return b""
            self.answer.id = self._head_id
            if writer is not None and "id" in data:
                data = {**data, "id": self._head_id}
        if writer is None:
            return event
        try:
            return comments + self._translated(data)
        except MALFORMED as error:
            if not writer.strict:
                return event
            self._malformed(error)
            return b""

    def _comments(self, event: bytes) -> bytes:
        """Those for the client, as an event of their own: servers send comments to keep a connection alive."""
        passed = []
        for comment in sse.comments_of(event):
            match model_version.in_comment(comment):
                case None:
                    passed.append(b":" + (b" " + comment if comment else b"") + b"\n")
                case model_version.RANGES, ranges:
                    self._ranges = ranges
                case _, version:
                    self._end_version = version
                    self._noted.append((len(self.answer.token_ids or ()), version))
        return b"".join(passed) + b"\n" if passed else b""

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

    def _flaw(self, error: Exception) -> None:
        self.answer.blemish(f"the answer has a form that {self._plan.path} does not have: {error!r}")
