"""Prints the output of commands: a table for people, JSON for programs."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from millstream.schemas.spans.text import json_text

out = Console()
err = Console(stderr=True)

MAX_PORT = 65535
Mode = Literal["train", "val", "test"]
Status = Literal["queued", "running", "retrying", "succeeded", "failed", "cancelled"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], as_json: bool, limit: int | None = None) -> None:
    """``limit``: maximum rows of a table; JSON always has all. A missing value is an empty cell, or null."""
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    out.print(table_of(columns, rows[:limit]))
    if limit is not None and len(rows) > limit:
        out.print(f"… and {len(rows) - limit} more")


def print_json(value: Any) -> None:
    """Valid JSON, whatever ``value`` holds."""
    out.print_json(json_text(value, str))


def table_of(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(*(Column(name, no_wrap=name == "rollout_id") for name in columns))  # so that ids can be copied
    for row in rows:
        table.add_row(*("" if value is None else escape(str(value)) for value in row))
    return table


def date(ns: int) -> str:
    """A time in ns since the epoch as text, in UTC."""
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")
