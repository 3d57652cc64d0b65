"""Serves the pages from a thread of this process."""

from collections.abc import Iterator
from contextlib import contextmanager

from millstream.consumers.log.port import Log
from millstream.pipeline.addresses import LOOPBACK, is_loopback
from millstream.pipeline.services.serve_asgi import listen, served_in_thread
from millstream.pipeline.ui.app import ui_app
from millstream.pipeline.ui.source import Source
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError


@contextmanager
def serving_pages(settings: Settings, log: Log | None, host: str = LOOPBACK, port: int = 0) -> Iterator[str]:
    """Yields their address (port 0: any free one). ``log``: None for pages that show the store alone. The store of the
    settings is opened when a page needs it. Raises `ConfigError` if the address is not available, or open to others
    without a token."""
    token = settings.gateway_token.get_secret_value()
    if not is_loopback(host) and not token:
        raise ConfigError(
            f"--host {host} is open to others: set gateway_token (MILLSTREAM_GATEWAY_TOKEN), or use {LOOPBACK}"
        )
    source = Source(settings, log)
    listener = listen(host, port)
    name = f"[{host}]" if ":" in host else host
    try:
        with served_in_thread(ui_app(source, token), listener, "millstream-pages"):
            yield f"http://{name}:{listener.getsockname()[1]}/"
    finally:
        source.close()
