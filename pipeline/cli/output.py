"""Prints the output of commands: a table for people, JSON for programs. Texts of records can't control the terminal."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from millstream.pipeline.cli.tables import Bar, Grid
from millstream.schemas.spans.text import CONTROLS, harmless, json_text

UNLIMITED: Final = 1 << 20  # columns


class SafeConsole(Console):
    """Prints control characters, such as those of escape sequences, as Python writes them (``\\x1b``), whatever holds
    them: a table, an error, a log line."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or CONTROLS.search(segment.text) is None:
                yield segment
            else:
                yield segment._replace(text=harmless(segment.text))

    @property
    def size(self) -> ConsoleDimensions:
        """That of the terminal. Lines into a pipe or a file are as long as their contents."""
        found = super().size
        return found if self.is_terminal else ConsoleDimensions(UNLIMITED, found.height)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        self._width, self._height = new


out = SafeConsole()
err = SafeConsole(stderr=True)

MAX_PORT = 65535
Mode = Literal["train", "val", "test"]
Status = Literal["queued", "running", "retrying", "succeeded", "failed", "cancelled"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
HealthPort = Annotated[
    int, typer.Option(min=0, max=MAX_PORT, help="Serves /livez, /readyz and /metrics on health_host; 0: off.")
]
Watch = Annotated[bool, typer.Option("--watch", help="Refresh every two seconds, until Ctrl-C.")]

WATCH_S: Final = 2.0


def print_rows(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    as_json: bool,
    limit: int | None = None,
    *,
    main: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> None:
    """``limit``: maximum rows of a table; JSON always has all. A missing value is an empty cell, or null. ``main``,
    ``texts``: see `Grid`."""
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    out.print(Grid(columns, rows[:limit], main, texts))
    if limit is not None and len(rows) > limit:
        out.print(f"… and {len(rows) - limit} more")


def say(text: str) -> None:
    """A line as it is, never wrapped."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """`say`, on stderr, so that output for programs stays as it is."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def working(what: str, unit: str = "") -> Iterator[Callable[[int, int | None], None]]:
    """Shows on a terminal's stderr that the body works, and nothing into files and pipes. Yields what to call with how
    much is done, and of how much if that is known; it shows both, and the rate. ``unit``: "bytes", or what is
    counted."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    amount = TextColumn("[progress.percentage]{task.fields[amount]}")
    columns = [SpinnerColumn(), TextColumn("{task.description}"), amount, TimeElapsedColumn()]
    began = time.monotonic()
    # Data may go to stdout meanwhile: it stays the file's.
    with Progress(
        *columns, console=err, transient=True, redirect_stdout=False, disable=not err.is_terminal
    ) as progress:
        task = progress.add_task(escape(what), total=None, amount="")

        def show(done: int, total: int | None = None) -> None:
            progress.update(task, amount=amount_of(done, total, unit, time.monotonic() - began))

        yield show


def amount_of(done: int, total: int | None, unit: str, seconds: float) -> str:
    """``12,000 of 40,000 records · 8,123/s``, or ``3.4 MB · 1.2 MB/s``."""
    from rich.filesize import decimal

    rate = int(done / max(seconds, 1e-3))
    if unit == "bytes":
        return f"{decimal(done)} · {decimal(rate)}/s"
    return f"{done:,}{'' if total is None else f' of {total:,}'} {unit} · {rate:,}/s"


def print_json(value: Any) -> None:
    """Valid JSON, whatever ``value`` holds."""
    text = json_text(value, str)
    out.print_json(text, ensure_ascii=CONTROLS.search(text) is not None)  # a JSON parser reads the same from it


def print_fields(fields: Mapping[str, Any]) -> None:
    """A line for each, wrapped by the terminal alone."""
    wide = max(map(len, fields), default=0)
    for name, value in fields.items():
        say(f"{name:{wide}}  {'' if value is None else value}".rstrip())


def check_watch(watch: bool, as_json: bool) -> None:
    if watch and as_json:
        raise typer.BadParameter("--watch shows a table: leave out --json")


def show_again(table: Callable[[], RenderableType]) -> None:
    """Shows what ``table`` returns, again every two seconds, until Ctrl-C."""
    from rich.live import Live

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
    return Bar((min(value, 0) - low) / size, (max(value, 0) - low) / size)


def date(ns: int) -> str:
    """A time in ns since the epoch as text, in UTC."""
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")
