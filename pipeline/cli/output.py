"""Prints the output of commands: a table for people, JSON for programs. Texts of records can't control the terminal."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import typer
from rich.bar import Bar
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.segment import Segment
from rich.table import Column, Table

from millstream.schemas.spans.text import CONTROLS, harmless, json_text


class SafeConsole(Console):
    """Prints control characters, such as those of escape sequences, as Python writes them (``\\x1b``), whatever holds
    them: a table, an error, a log line."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or CONTROLS.search(segment.text) is None:
                yield segment
            else:
                yield segment._replace(text=harmless(segment.text))


out = SafeConsole()
err = SafeConsole(stderr=True)

MAX_PORT = 65535
Mode = Literal["train", "val", "test"]
Status = Literal["queued", "running", "retrying", "succeeded", "failed", "cancelled"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Watch = Annotated[bool, typer.Option("--watch", help="Refresh every two seconds, until Ctrl-C.")]

WATCH_S: Final = 2.0
BAR_WIDTH: Final = 40


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], as_json: bool, limit: int | None = None) -> None:
    """``limit``: maximum rows of a table; JSON always has all. A missing value is an empty cell, or null."""
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    out.print(table_of(columns, rows[:limit]))
    if limit is not None and len(rows) > limit:
        out.print(f"… and {len(rows) - limit} more")


def say(text: str) -> None:
    """A line as it is, never wrapped."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """`say`, on stderr, so that output for programs stays as it is."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Valid JSON, whatever ``value`` holds."""
    text = json_text(value, str)
    out.print_json(text, ensure_ascii=CONTROLS.search(text) is not None)  # a JSON parser reads the same from it


def table_of(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(*(Column(name, no_wrap=name == "rollout_id") for name in columns))  # so that ids can be copied
    for row in rows:
        table.add_row(*("" if value is None else escape(str(value)) for value in row))
    return table


def check_watch(watch: bool, as_json: bool) -> None:
    if watch and as_json:
        raise typer.BadParameter("--watch shows a table: leave out --json")


def show_again(table: Callable[[], RenderableType]) -> None:
    """Shows what ``table`` returns, again every two seconds, until Ctrl-C."""
    with suppress(KeyboardInterrupt), Live(table(), console=out, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_S)
            live.update(table(), refresh=True)


def bar_range(values: Iterable[float]) -> tuple[float, float]:
    """The lowest end of bars of these values, which begin at 0, and the length that they need."""
    shown = [0.0, *values]
    return min(shown), max(shown) - min(shown) or 1.0


def bar_of(value: float, low: float, size: float) -> Bar:
    """``low`` and ``size``: see `bar_range`."""
    return Bar(size, min(value, 0) - low, max(value, 0) - low, width=BAR_WIDTH, color="green")


def date(ns: int) -> str:
    """A time in ns since the epoch as text, in UTC."""
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")
