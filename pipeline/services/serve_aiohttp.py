"""Serves aiohttp applications: the proxy and the engine."""

import asyncio
import logging
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from millstream.schemas.errors import ConfigError

SHUTDOWN_S = 5.0  # how long requests under way may take when the block ends
HEAD_S = 75.0  # how long a connection may be idle, or take to send a request's head
CONNECTIONS = 8192  # of a server, at a time; and at most half of the process's file descriptors
logger = logging.getLogger(__name__)


def _without_content(record: logging.LogRecord) -> bool:
    """aiohttp logs the malformed line of a request, which may hold a key."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg = f"a malformed request from %s: {type(error).__name__}"
    return True


logger.addFilter(_without_content)


@asynccontextmanager
async def serve(
    app: web.Application,
    url: str,
    *,
    shutdown_s: float = SHUTDOWN_S,
    reuse_port: bool = False,
    head_s: float = HEAD_S,
    connections: int = CONNECTIONS,
) -> AsyncIterator[str]:
    """Listens at ``url`` (port 0: any free one) while the body runs, and yields its URL. A handler is cancelled when
    its client disconnects. With ``reuse_port`` a successor may listen there while this one lets its last requests end,
    for ``shutdown_s``. A connection beyond ``connections`` takes the place of an idle one; if all are at work it is
    closed itself. Raises `ConfigError` if the address is not available."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or parts.port is None:
        raise ConfigError(f"{url!r} can't be served: use http://HOST:PORT")
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=logger,
        shutdown_timeout=shutdown_s,
        handler_cancellation=True,
        keepalive_timeout=head_s,
    )
    await runner.setup()
    assert runner.server is not None
    _bound(runner.server, min(connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
    try:
        try:
            await web.TCPSite(runner, parts.hostname, parts.port, reuse_port=reuse_port).start()
        except OSError as error:
            raise ConfigError(f"can't listen at {url}: {error.strerror}; another process may have the port") from error
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def _bound(server: web.Server, connections: int) -> None:
    made = server.connection_made

    def connection_made(handler: RequestHandler, transport: asyncio.Transport) -> None:
        made(handler, transport)
        others = server.connections
        if len(others) > connections:
            idle = (
                each for each in others if each._current_request is None and not each._close and each is not handler
            )
            oldest = next(idle, None)
            (transport if oldest is None else oldest).close()

    server.connection_made = connection_made  # type: ignore[method-assign]
