"""``millstream sql`` and ``millstream export``: SQL of the user's own, to the terminal or into a file."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from millstream.pipeline.cli.open import open_settings, open_store
from millstream.pipeline.cli.output import Json, print_rows, working
from millstream.schemas.errors import ConfigError

app = typer.Typer()

FORMATS: Final = {"csv": "CSVWithNames", "parquet": "Parquet", "jsonl": "JSONEachRow"}  # ClickHouse's names

Parameters = Annotated[list[str] | None, typer.Option("--param", help="name=value for {name:Type}; repeatable.")]


@app.command(epilog='Example: millstream sql "SELECT status, count() FROM rollouts GROUP BY status"')
def sql(
    query: Annotated[str, typer.Argument(help="A statement that reads.")],
    parameters: Parameters = None,
    output: Annotated[Literal["table", "csv", "json", "parquet"], typer.Option("--format")] = "table",
    as_json: Json = False,
) -> None:
    """Run a query on the store."""
    bound = _bound(parameters or ())
    if output == "parquet" and sys.stdout.isatty():
        raise typer.BadParameter("parquet can't be printed to a terminal: redirect it, or use `millstream export`")
    with open_store(open_settings()) as store:
        if output in FORMATS and not as_json:
            store.export(query, sys.stdout.buffer, FORMATS[output], bound)
            sys.stdout.buffer.flush()
            return
        result = store.sql(query, bound)
    print_rows(result.columns, result.rows, as_json or output == "json")


@app.command(epilog="Example: millstream export rollouts rollouts.parquet")
def export(
    source: Annotated[str, typer.Argument(help="A table, a view or a SELECT.")],
    file: Annotated[Path, typer.Argument(help="Ends with .parquet, .csv or .jsonl; replaced if it exists.")],
    parameters: Parameters = None,
    as_json: Json = False,
) -> None:
    """Write a table, or the result of a query, to a file."""
    file_format = FORMATS.get(file.suffix.removeprefix("."))
    if file_format is None:
        raise typer.BadParameter(f"{file} must end with one of {', '.join(f'.{name}' for name in FORMATS)}")
    bound = _bound(parameters or ())
    if re.fullmatch(r"[A-Za-z_]\w*", source):
        source, bound = "SELECT * FROM {source:Identifier}", bound | {"source": source}
    unfinished = file.with_name(f"{file.name}.part")
    try:
        with (
            working(f"writing {file}", "bytes") as show,
            open_store(open_settings()) as store,
            unfinished.open("wb") as opened,
        ):
            store.export(source, opened, file_format, bound, lambda written: show(written, None))
        unfinished.replace(file)
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    print_rows(["file", "bytes"], [[str(file), file.stat().st_size]], as_json)


def _bound(parameters: Sequence[str]) -> dict[str, str]:
    pairs = [parameter.partition("=") for parameter in parameters]
    for name, equals, _ in pairs:
        if not equals:
            raise typer.BadParameter(f"--param {name!r} is not name=value")
    return {name: value for name, _, value in pairs}
