"""Commands about the store itself."""

from typing import Annotated

import typer

from millstream.pipeline.cli_output import Json, print_rows
from millstream.schemas.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="The store: what its queries read.")


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
