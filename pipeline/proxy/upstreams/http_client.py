"""HTTP/1.1 to a model server, over connections that are kept open.

A general client took a third of the proxy's CPU; this one takes a fifth of that. The parser is llhttp (of Node.js), by
httptools. Protocol: RFC 9112, without redirects and cookies. Compression is not asked for; answers that come with gzip
or deflate in spite of that are decompressed.
"""

import asyncio
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, cast
from urllib.parse import urlsplit

import httptools
from aiohappyeyeballs import start_connection

COMPRESSED: Final = ("gzip", "x-gzip", "deflate")
# A machine that has vanished says nothing: its connections end after a minute, answers that take hours do not.
PROBES: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}  # s, ms


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionPolicy:
    """How long connections are waited for and kept, and how much is read ahead."""

    connect_s: float = 5.0  # a machine that is up answers within milliseconds; a lost SYN is repeated after 1 s and 3 s
    idle_s: float = 60.0  # unused for longer, it is not used again: the server may just be closing it
    unread: int = 256 << 10  # bytes of an answer that are held for a slow reader; then the server has to wait
    head: int = 256 << 10  # bytes of an answer's headers; a tenth of that is plenty
    body: int = 128 << 20  # bytes of an answer, decompressed: 1,000 embeddings of 4,000 numbers, twice


class HttpError(Exception):
    """The server can't be reached, broke off, or does not speak HTTP. ``unseen``: the server closed an idle connection
    just as it was used, and has not seen the request."""

    def __init__(self, message: str, *, unseen: bool = False) -> None:
        super().__init__(message)
        self.unseen = unseen


class Server:
    """The connections to one server. ``url`` may have a path, below which all requests go. Belongs to one event
    loop."""

    def __init__(self, url: str, max_connections: int = 512, policy: ConnectionPolicy = ConnectionPolicy()) -> None:
        self.policy = policy
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/")
        self._shared = f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept-Encoding: identity\r\n"
        self._places = asyncio.Semaphore(max_connections)
        self._idle: list[_Connection] = []  # the one used last is used next
        self._all: set[_Connection] = set()

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> "Exchange":
        """To be entered: ``async with server.request(…) as answer``."""
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
            raise ValueError("a header holds a line break")
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._shared}{lines}Content-Length: {len(body)}\r\n\r\n"
        return Exchange(self, head.encode("utf-8", "surrogateescape") + body)

    def close(self) -> None:
        for connection in list(self._all):
            connection.transport.abort()

    async def connection(self, *, new: bool) -> "_Connection":
        """For one exchange, which ends with `done`. Raises `HttpError`."""
        await self._places.acquire()
        try:
            horizon = time.monotonic() - self.policy.idle_s
            while self._idle:
                connection = self._idle.pop()
                if not new and connection.used > horizon and not connection.transport.is_closing():
                    return connection
                connection.transport.abort()
            return await self._connect()
        except BaseException:
            self._places.release()
            raise

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.policy.connect_s):
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                sock = await start_connection(found, happy_eyeballs_delay=0.25)  # RFC 8305; uvloop does not have it
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in PROBES.items():
                    if hasattr(socket, name):  # Linux has them all
                        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._gone, self.policy),
                    sock=sock,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
        except TimeoutError as error:
            raise HttpError(f"no connection within {self.policy.connect_s:.0f} s") from error
        except OSError as error:  # ssl.SSLError, too
            raise HttpError(error.strerror or str(error)) from error
        self._all.add(connection)
        return connection

    def done(self, connection: "_Connection") -> None:
        """The exchange has ended, or was left early."""
        if connection.reusable:
            connection.used = time.monotonic()
            self._idle.append(connection)
        else:
            connection.transport.abort()
        self._places.release()

    def _gone(self, connection: "_Connection") -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class Exchange:
    """A request and its answer. Leaving it before the end closes the connection, so that the server stops."""

    status: int
    headers: Mapping[str, str]  # names in lower case

    def __init__(self, server: Server, request: bytes) -> None:
        self._server = server
        self._request = request
        self._connection: _Connection | None = None
        self._inflate: _Inflate | None = None
        self._size = 0  # bytes of the body so far, decompressed

    async def __aenter__(self) -> Self:
        """Returns when the head of the answer has come. Raises `HttpError`."""
        try:
            await self._begin(new=False)
        except HttpError as error:
            if not error.unseen:
                raise
            await self._begin(new=True)
        return self

    async def _begin(self, *, new: bool) -> None:
        connection = await self._server.connection(new=new)
        try:
            await connection.ask(self._request)
        except BaseException:
            self._server.done(connection)
            raise
        self._connection = connection
        self.status, self.headers = connection.status, connection.headers

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._server.done(self._connection)

    @property
    def _connected(self) -> "_Connection":
        assert self._connection is not None, "enter it first"
        return self._connection

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """What is left of the body. Raises `HttpError`."""
        pieces = []  # not by `pieces`: each call comes through here, and asyncio keeps a list of running generators
        while piece := await self._next():
            pieces.append(piece)
        return b"".join(pieces)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises `HttpError`."""
        while piece := await self._next():
            yield piece

    async def _next(self) -> bytes:
        """Of the body, decompressed; empty at its end."""
        most, connection = self._server.policy.body, self._connected
        if self._inflate is None and self.headers.get("content-encoding", "").strip().lower() in COMPRESSED:
            self._inflate = _Inflate(most)
        while piece := await connection.next():
            if self._inflate is not None and not (piece := self._inflate.feed(piece)):
                continue
            self._size += len(piece)
            if self._size > most:
                raise HttpError(f"the answer has more than {most:,} bytes")
            return piece
        if self._inflate is not None:
            self._inflate.end()
        return b""


class _Inflate:
    """A body in gzip (RFC 1952, of several members, too) or deflate, which some servers send with the head of RFC 1950
    and some without. ``most``: bytes that a piece may become."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # finds out which head it has, from two bytes
        self._early = b""
        self._begun = False

    def feed(self, piece: bytes) -> bytes:
        """Raises `HttpError`."""
        out = b""
        if not self._begun:
            piece, self._early = self._early + piece, piece
            if len(piece) < 2:
                return b""
        try:
            while piece:
                out += self._stream.decompress(piece, self._most + 1 - len(out))
                self._begun = True
                if len(out) > self._most or not self._stream.eof:
                    break
                piece = self._stream.unused_data
                if piece:
                    self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)
        except zlib.error as error:
            if self._begun:
                raise HttpError(f"the answer can't be decompressed: {error}") from error
            self._stream, self._begun = zlib.decompressobj(-zlib.MAX_WBITS), True
            return self.feed(piece)
        return out

    def end(self) -> None:
        """Raises `HttpError` if something is missing."""
        if self._begun and not self._stream.eof:
            raise HttpError("the compressed answer is incomplete")


class _Connection(asyncio.Protocol):
    """One exchange at a time. The parser calls the methods named ``on_…``."""

    transport: asyncio.Transport

    def __init__(self, gone: "Callable[[_Connection], None]", policy: ConnectionPolicy) -> None:
        self._gone = gone
        self._max_unread = policy.unread
        self._max_head = policy.head
        self._idle_bytes = 0  # that have come in a row and are neither of a body nor the end of a head
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self.used = 0.0  # last, monotonic
        self.status = 0
        self.headers: dict[str, str] = {}
        self.reusable = False
        self._served = 0
        self._open = False  # an answer is awaited or coming
        self._begun = False
        self._head_complete = False
        self._pieces: list[bytes] = []
        self._unread = 0
        self._error: HttpError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def ask(self, request: bytes) -> None:
        """Returns when the head of the answer has come. Raises `HttpError`."""
        self.headers, self._pieces, self._unread = {}, [], 0
        self._open, self.reusable, self._begun, self._head_complete = True, False, False, False
        self.transport.resume_reading()
        self.transport.write(request)
        while not self._head_complete:
            await self._more()

    async def next(self) -> bytes:
        """Of the body; empty at its end. Raises `HttpError`."""
        while not self._pieces:
            if not self._open and self._error is None:
                return b""
            await self._more()
        found, self._pieces = b"".join(self._pieces), []
        if self._unread > self._max_unread and not self.transport.is_closing():
            self.transport.resume_reading()
        self._unread = 0
        return found

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, message: str) -> None:
        """Nothing that follows is used; an answer that was complete by then stays so."""
        if self._open:
            self._error = HttpError(message, unseen=not self._begun and self._served > 0)
        self._open = self.reusable = False
        self.transport.abort()

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._begun = True
        self._idle_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"it does not speak HTTP: {error}")
        if self._idle_bytes > self._max_head:
            self._fail(f"the head of its answer has more than {self._max_head:,} bytes")
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self._open:
            ends_here = "content-length" not in self.headers and "transfer-encoding" not in self.headers
            if self._head_complete and ends_here and error is None:
                self._open = False
            else:
                self._fail(f"the connection broke off: {error}" if error else "it hung up")
        self.reusable = False
        self._gone(self)
        self._wake()

    # --- The parser

    def on_message_begin(self) -> None:
        if not self._open:  # ends the parsing
            raise ValueError("the server answered without being asked")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_complete:  # a trailer
            return
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._head_complete = self.status >= 200
        if self._head_complete:
            self._idle_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        self._pieces.append(body)
        self._unread += len(body)
        if self._unread > self._max_unread:
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        if not self._head_complete:  # an interim answer, as 100 Continue
            self.headers = {}
            return
        self._open, self._idle_bytes = False, 0
        self._served += 1
        self.reusable = self._parser.should_keep_alive()
