"""Serves ASGI applications with uvicorn."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn
from starlette.requests import Request
from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from millstream.pipeline.addresses import names_this_machine
from millstream.producers.supervisor import supervisor
from millstream.schemas.errors import ConfigError

SHUTDOWN_S: Final = 5  # for requests under way to end
CONNECTIONS: Final = 256  # of a server, at a time
KEEP_ALIVE_S: Final = 30  # of an idle connection, as ClickHouse: clients that ask now and then find it open


def for_this_machine(request: Request) -> bool:
    """Whether it was sent to a name of this machine's own."""
    return names_this_machine(request.headers.get("host", ""))


def limited(request: Request, limit: int, refusal: Exception) -> Request:
    """The request, whose body raises ``refusal`` once more than ``limit`` bytes of it have come."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise refusal
        return message

    return Request(request.scope, receive)


async def body_of(request: Request, limit: int, seconds: float, too_large: Exception, late: Exception) -> bytes:
    """The whole body. Raises ``too_large`` if it has more than ``limit`` bytes, and ``late`` if it has not come within
    ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            return await limited(request, limit, too_large).body()
    except TimeoutError:
        raise late from None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free one. Raises `ConfigError` if the address is not available."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"can't listen at {host}:{port}: {error.strerror}; another process may have the port"
        ) from error
    # asyncio sets it only for sockets that it creates. Without it a client's delayed ACK delays each answer by 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def bounded(connections: int, idle_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with a limit of connections, which take the process's file descriptors. A connection is closed
    when it has been idle, or has taken to send a request's head, for ``idle_s``. One too many takes the place of the
    one that has been idle longest; if all are at work it is closed itself."""

    class Bounded(HttpToolsProtocol):
        idle_since: float

        @property
        def idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._rest()
            if len(self.connections) > connections:
                resting = [other for other in self.connections if isinstance(other, Bounded) and other.idle]
                min(resting, key=lambda other: other.idle_since, default=self).transport.close()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._rest()

        def _rest(self) -> None:
            self.idle_since = self.loop.time()
            self.loop.call_later(idle_s, self._close_if_idle, self.cycle)

        def _close_if_idle(self, last: object) -> None:
            if self.cycle is last and self.idle:
                self.transport.close()

    return Bounded


def uvicorn_server(app: Any, **options: Any) -> uvicorn.Server:
    """A server for `listen` sockets, with ``options`` of `uvicorn.Config`. In the main thread it stops at SIGTERM and
    SIGINT, and raises the signal again when it has shut down; elsewhere it ignores signals."""
    defaults = {
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        "timeout_graceful_shutdown": SHUTDOWN_S,
        "timeout_keep_alive": KEEP_ALIVE_S,
        "http": bounded(CONNECTIONS, KEEP_ALIVE_S),
    }
    return uvicorn.Server(uvicorn.Config(app, **defaults | options))


@contextmanager
def served_in_thread(app: Any, listener: socket.socket, name: str, **options: Any) -> Iterator[uvicorn.Server]:
    """Serves an application without a lifespan while the body runs, then lets requests under way end."""
    server = uvicorn_server(app, lifespan="off", **options)

    def serve() -> None:
        server.run([listener])
        if not server.should_exit:
            raise RuntimeError("the server has stopped")

    thread = supervisor().thread(name, serve)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()
