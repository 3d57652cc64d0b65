"""``millstream monitor``."""

import asyncio
from typing import Annotated

import typer

from millstream.schemas.settings import load_settings

app = typer.Typer()


@app.command(epilog="Example: millstream monitor --port 8600")
def monitor(
    host: Annotated[str, typer.Option(help="Where to listen; not on loopback it needs monitor_token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8600,
) -> None:
    """Serve HTTP: publish, cancel, pause, status of rollouts, KPIs, metrics, a page of the topics."""
    from millstream.pipeline.monitor import serve_monitor

    asyncio.run(serve_monitor(load_settings(), host, port))
