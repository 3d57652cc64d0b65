"""Serves an ASGI application until a signal ends the process."""

import asyncio
import signal
import socket
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.requests import Request
from starlette.types import Message

from millstream.pipeline.addresses import is_loopback
from millstream.schemas.errors import ConfigError

SHUTDOWN_S = 5  # how long requests under way may go on after the signal
KEEP_ALIVE_S = 30  # of an idle connection, as ClickHouse does: clients that ask now and then find it open


def for_this_machine(request: Request) -> bool:
    """Whether it was sent to a name of this machine's own: a web page may have another name resolve to loopback."""
    return is_loopback(urlsplit("//" + request.headers.get("host", "")).hostname or "")


def limited(request: Request, limit: int, refusal: Exception) -> Request:
    """The request, whose body raises ``refusal`` when more than ``limit`` bytes of it have come."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise refusal
        return message

    return Request(request.scope, receive)


def listen(host: str, port: int) -> socket.socket:
    """Port 0: any free one. Raises `ConfigError` if the address can't be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"can't listen at {host}:{port}: {error.strerror}; another process may have the port"
        ) from error
    # asyncio does so for sockets of its own making alone: else a client's delayed ACK holds up each answer for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve_until_signal(app: Any, listener: socket.socket) -> bool:
    """Serves until SIGTERM or SIGINT; returns whether the application had started at all."""
    # uvicorn ends in good order at a signal, and raises it once more then: there may be things to close.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    await server.serve(sockets=[listener])
    return server.started
