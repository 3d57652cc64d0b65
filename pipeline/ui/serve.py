"""Serves the pages from a thread of this process."""

from collections.abc import Iterator
from contextlib import contextmanager

from millstream.consumers.log.port import Log
from millstream.pipeline.addresses import LOOPBACK
from millstream.pipeline.services.serve_asgi import listen, served_in_thread
from millstream.pipeline.ui.app import ui_app
from millstream.pipeline.ui.gate import check_open
from millstream.pipeline.ui.source import Source
from millstream.schemas.config.settings import Settings


@contextmanager
def serving_pages(settings: Settings, log: Log | None, host: str = LOOPBACK, port: int = 0) -> Iterator[str]:
    """Yields their address (port 0: any free one). ``log``: None for pages that show the store alone. The store of the
    settings is opened when a page needs it. Raises `ConfigError` if the address is not available, or open to others
    without a token."""
    check_open(settings, host)
    source = Source(settings, log)
    listener = listen(host, port)
    name = f"[{host}]" if ":" in host else host
    try:
        app = ui_app(source, settings.gateway_token.get_secret_value())
        with served_in_thread(app, listener, "millstream-pages") as server:
            source.ends = lambda: server.should_exit
            yield f"http://{name}:{listener.getsockname()[1]}/"
    finally:
        source.close()
