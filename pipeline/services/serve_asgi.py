"""Serves ASGI applications with uvicorn."""

import asyncio
import logging
import signal
import socket
from typing import Any, Final
from urllib.parse import urlsplit

import uvicorn
from starlette.requests import Request
from starlette.types import Message

from millstream.pipeline.addresses import is_loopback
from millstream.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

SHUTDOWN_S: Final = 5  # how long requests under way may take after the signal
KEEP_ALIVE_S: Final = 30  # of an idle connection, as ClickHouse: clients that ask now and then find it open


def for_this_machine(request: Request) -> bool:
    """Whether it was sent to a name of this machine's own: a web page may make another name resolve to loopback."""
    return is_loopback(urlsplit("//" + request.headers.get("host", "")).hostname or "")


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


def uvicorn_server(app: Any, **options: Any) -> uvicorn.Server:
    """A server for one or more `listen` sockets. ``options``: of `uvicorn.Config`."""
    defaults = {
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        "timeout_graceful_shutdown": SHUTDOWN_S,
        "timeout_keep_alive": KEEP_ALIVE_S,
    }
    return uvicorn.Server(uvicorn.Config(app, **defaults | options))


async def serve_until_signal(app: Any, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then lets requests under way end."""
    # uvicorn raises the signal again when it has shut down; without a handler the process would end before its caller
    # has closed what is open.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)
    logger.info("listening at %s:%d", *listener.getsockname()[:2])
    await uvicorn_server(app).serve(sockets=[listener])
