"""Commands about the store itself."""

import asyncio
from typing import Annotated

import typer

from millstream.pipeline.cli_output import Json, print_rows
from millstream.pipeline.kafka_log import KafkaLog
from millstream.schemas.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="The store: fill it, and see what its queries read.")


@app.command(epilog="Example: millstream store explain \"SELECT * FROM spans WHERE RolloutId = '…'\"")
def explain(query: Annotated[str, typer.Argument(help="One SELECT.")], as_json: Json = False) -> None:
    """Show how many granules (8192 rows or fewer) of each table a query reads, and what leaves the others unread."""
    from millstream.pipeline.queries import granules_read
    from millstream.pipeline.store import ClickHouseStore

    store = ClickHouseStore(load_settings())
    try:
        result = granules_read(store, query)
    finally:
        store.close()
    print_rows(result.columns, result.rows, as_json)


@app.command("rebuild", epilog="Example: MILLSTREAM_CLICKHOUSE_DATABASE=again millstream store rebuild")
def store_rebuild(as_json: Json = False) -> None:
    """Fill an empty store with everything that the topics still hold; a sink then goes on where the last one ended."""
    from millstream.pipeline.rebuild import rebuild
    from millstream.pipeline.store import ClickHouseStore

    settings = load_settings()

    async def work() -> tuple[int, int]:
        log = KafkaLog(settings)
        await log.check()
        store = ClickHouseStore(settings)
        try:
            return await rebuild(log, store, settings.topics)
        finally:
            store.close()

    print_rows(("records", "unusable"), [asyncio.run(work())], as_json)
