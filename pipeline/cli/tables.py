"""Tables for people: as wide as the terminal, or vertical if that is too narrow; whole lines into files and pipes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from millstream.schemas.spans.text import on_one_line

LEAST_TEXT: Final = 16  # characters of a text that is cut
LONGEST_BAR: Final = 40
LEAST_BAR: Final = 6
PLAIN_BAR: Final = 20
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Bar:
    """A cell: a bar from ``begin`` to ``end``, as shares of the column."""

    begin: float
    end: float

    def text(self, width: int) -> str:
        left, right = round(self.begin * width), round(self.end * width)
        return " " * left + "█" * (right - left)


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows under columns. A missing value is an empty cell.

    On a terminal: all columns if they fit, else ``main`` with short ids, else each row as lines of its own. A value in
    one of ``texts`` may be cut there. Elsewhere (a pipe, a file) nothing is left out: a line for each row.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    main: Sequence[str] = ()
    texts: Sequence[str] = ()
    title: str = ""
    dim: frozenset[int] = frozenset()  # rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = [Text(self.title, style="italic", no_wrap=True, overflow="ignore")] if self.title else []
        if not console.is_terminal:
            lines = [self.title] if self.title else []
            yield Text("\n".join([*lines, *self.plain()]), no_wrap=True, overflow="ignore")
            return
        width = options.max_width
        everything = self._fitted(range(len(self.columns)), width, short=False)
        main = [at for at, name in enumerate(self.columns) if name in (self.main or self.columns)]
        found = everything or self._fitted(main, width, short=False) or self._fitted(main, width, short=True)
        yield from title
        yield found or self._vertical()

    def plain(self) -> list[str]:
        """Lines without borders, as wide as their contents."""
        rows = [[_text(cell, PLAIN_BAR) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]

    def _fitted(self, places: Sequence[int], width: int, *, short: bool) -> Table | None:
        """None if the columns at these places are too wide."""
        bars = {at for at in places if any(isinstance(row[at], Bar) for row in self.rows)}
        rows = [{at: _short(row[at]) if short else row[at] for at in places} for row in self.rows]
        natural = {
            at: max((cell_len(text) for text in (self.columns[at], *(_text(row[at], 0) for row in rows))), default=0)
            for at in places
        }
        left = width - 3 * len(places) - 1  # borders and padding
        needed = dict(natural)
        for at in places:
            if at in bars:
                needed[at] = max(natural[at], LEAST_BAR)
            elif self.columns[at] in self.texts:
                needed[at] = min(natural[at], max(LEAST_TEXT, cell_len(self.columns[at])))
        spare = left - sum(needed.values())
        if spare < 0:
            return None
        widths = {}
        for at in places:  # texts first, for they say more than bars
            more = min(natural[at] - needed[at], spare) if at not in bars else 0
            widths[at], spare = needed[at] + more, spare - more
        for at in bars:
            more = min(LONGEST_BAR - widths[at], spare)
            widths[at], spare = widths[at] + more, spare - more
        table = Table(box=box.HEAVY_HEAD)
        for at in places:
            table.add_column(Text(self.columns[at]), width=widths[at], no_wrap=True, overflow="ellipsis")
        for number, row in enumerate(rows):
            cells = [
                Text(_text(row[at], widths[at]), style="green" if at in bars else "", no_wrap=True, overflow="ellipsis")
                for at in places
            ]
            table.add_row(*cells, style="dim" if number in self.dim else "")
        return table

    def _vertical(self) -> Text:
        wide = max(map(cell_len, self.columns), default=0)
        blocks = [
            "\n".join(
                f"{set_cell_size(name, wide)}  {_text(cell, PLAIN_BAR)}".rstrip()
                for name, cell in zip(self.columns, row, strict=True)
                if _text(cell, PLAIN_BAR)
            )
            for row in self.rows
        ]
        return Text("\n\n".join(blocks))


def short_id(value: str) -> str:
    """The last 12 digits of a UUID, all of them random; anything else as it is. Commands take it for the whole id."""
    return value[-12:] if _UUID.fullmatch(value) else value


def _short(cell: Any) -> Any:
    return short_id(cell) if isinstance(cell, str) else cell


def _text(cell: Any, width: int) -> str:
    """``width``: of a bar."""
    if isinstance(cell, Bar):
        return cell.text(width)
    return "" if cell is None else on_one_line(str(cell))
