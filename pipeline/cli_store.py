"""Commands on the store itself: fill an empty one from the log."""

import asyncio

import typer

from millstream.pipeline.cli_output import Json, print_rows
from millstream.pipeline.kafka_log import KafkaLog
from millstream.schemas.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="The store itself.")


@app.callback()
def store() -> None:
    """With one command alone typer would drop its name."""


@app.command("rebuild", epilog="Example: MILLSTREAM_CLICKHOUSE_DATABASE=again millstream store rebuild")
def store_rebuild(as_json: Json = False) -> None:
    """Fill an empty store with everything that the topics still hold; a sink then goes on where the last one ended."""
    from millstream.pipeline.rebuild import rebuild
    from millstream.pipeline.store import Store

    settings = load_settings()

    async def work() -> tuple[int, int]:
        log = KafkaLog(settings)
        await log.check()
        store = Store(settings)
        try:
            return await rebuild(log, store, settings.topics)
        finally:
            store.close()

    print_rows(("records", "unusable"), [asyncio.run(work())], as_json)
