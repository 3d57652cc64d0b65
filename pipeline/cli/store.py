"""Commands about the store itself."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from millstream.consumers.log.port import Log
from millstream.pipeline.cli.open import open_store, with_log
from millstream.pipeline.cli.output import Json, err, print_rows
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="The store: fill it, share it, and see what its queries read.")


@app.command(epilog="Example: millstream store explain \"SELECT * FROM spans WHERE RolloutId = '…'\"")
def explain(query: Annotated[str, typer.Argument(help="One SELECT.")], as_json: Json = False) -> None:
    """Show how many granules (8192 rows or fewer) of each table a query reads, and what leaves the others unread."""
    from millstream.pipeline.store.queries import granules_read

    with open_store(load_settings()) as store:
        result = granules_read(store, query)
    print_rows(result.columns, result.rows, as_json)


@app.command("rebuild", epilog="Example: MILLSTREAM_CLICKHOUSE_DATABASE=again millstream store rebuild")
def store_rebuild(as_json: Json = False) -> None:
    """Fill an empty store with everything that the topics still hold; a sink then goes on where the last one ended."""
    from millstream.pipeline.store.rebuild import rebuild

    settings = load_settings()

    async def work(log: Log) -> tuple[int, int]:
        with open_store(settings) as store:
            return await rebuild(log, store, settings.topics)

    print_rows(("records", "unusable"), [with_log(settings, work)], as_json)


@app.command(
    epilog="Example: millstream store serve runs/store, and for everybody else "
    "MILLSTREAM_CLICKHOUSE_DSN=clickhouse://127.0.0.1:8123"
)
def serve(
    folder: Annotated[Path, typer.Argument(help="The embedded store's.")] = Path("runs/store"),
    host: Annotated[
        str, typer.Option(help="Where to listen; not on loopback it needs clickhouse_password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, help="0: any free one.")] = 8123,
    max_request_mb: Annotated[int, typer.Option(min=1, help="What a request may hold, in MiB.")] = 256,
) -> None:
    """Let several processes share an embedded store, over HTTP as a ClickHouse server takes it. For development.

    With clickhouse_password set, clients have to send it. Whoever may ask can read and write this user's files, too.
    """
    from millstream.pipeline.addresses import is_loopback
    from millstream.pipeline.services.serve_asgi import listen, serve_until_signal
    from millstream.pipeline.store.engine import Engine
    from millstream.pipeline.store.read_server import store_app

    password = load_settings().clickhouse_password.get_secret_value()
    if not is_loopback(host) and not password:
        raise ConfigError(
            f"--host {host} is open to others: set clickhouse_password (MILLSTREAM_CLICKHOUSE_PASSWORD), or use "
            "127.0.0.1"
        )
    engine = Engine(folder)
    try:
        with listen(host, port) as listener:
            address = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            err.print(f"for development: {folder} is served at clickhouse://{address}", highlight=False)
            asyncio.run(serve_until_signal(store_app(engine, password, max_request_mb << 20), listener))
    finally:
        engine.close()
