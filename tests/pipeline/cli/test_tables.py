"""Tables on terminals of any width, in files and in pipes."""

import io
import re
import uuid

import pytest
from rich.cells import cell_len

from millstream.pipeline.cli.output import SafeConsole
from millstream.pipeline.cli.tables import Bar, Grid, short_id

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
COLUMNS = ("rollout_id", "experiment", "mode", "status", "attempts", "reward", "version", "seconds", "created", "error")
ERROR = "ValueError: " + "no good " * 20
ROW = (
    ID,
    "demo",
    "train",
    "failed",
    3,
    -0.5,
    "run.0.12",
    1.234,
    "2026-11-30 08:00:00",
    ERROR,
)
MAIN = ("rollout_id", "status", "attempts", "reward", "seconds", "error")


def shown(grid: Grid, width: int | None, *, terminal: bool = True) -> str:
    written = io.StringIO()
    SafeConsole(file=written, force_terminal=terminal, width=width, color_system=None).print(grid)
    return written.getvalue()


def grid(rows: int = 3) -> Grid:
    return Grid(COLUMNS, [ROW] * rows, MAIN, texts=("error", "version"))


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 81, 100, 120, 160, 250])
def test_a_table_fits_the_terminal_and_cuts_nothing_but_texts(width: int) -> None:
    """Entry B1: no cells of one letter."""
    text = shown(grid(), width)
    lines = text.splitlines()
    for needed in (*("failed", "-0.5", "1.234"), short_id(ID)):
        assert text.count(needed) == 3, text
    if "━" in text:
        assert max(map(cell_len, lines)) <= width
        assert len(lines) == 3 + 4  # each row is one line
        assert re.search(r"ValueError: no", text)


def test_few_columns_are_shown_at_80() -> None:
    text = shown(grid(), 80)
    assert "attempts" in text
    assert "created" not in text
    assert ID not in text  # by its last digits, which commands take


def test_all_columns_are_shown_where_they_fit() -> None:
    text = shown(grid(), 200)
    assert "created" in text
    assert ID in text


def test_a_narrow_terminal_has_rows_one_below_the_other() -> None:
    text = shown(grid(2), 40)
    assert "━" not in text
    assert f"rollout_id  {ID}\n" in text.replace("rollout_id \n", "") or ID in "".join(text.split())
    assert len(re.findall(r"^created", text, re.MULTILINE)) == 2


@pytest.mark.parametrize("columns", ["20", "80", None])
def test_nothing_is_cut_in_a_pipe(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry B1. A line for each row, whatever it holds."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    rows = [ROW, (*ROW[:-1], "two\nlines\x1b[2J"), (*ROW[:-1], None)]
    head, *lines = shown(Grid(COLUMNS, rows, MAIN), None, terminal=False).splitlines()
    assert head.split() == list(COLUMNS)
    assert [line.split()[0] for line in lines] == [ID] * 3
    assert lines[0].endswith(("no good " * 20).strip())
    assert lines[1].endswith("two\\nlines\\x1b[2J")
    assert lines[2].endswith("2026-11-30 08:00:00")


def test_columns_of_a_pipe_are_aligned_for_wide_characters_too() -> None:
    lines = shown(Grid(("a", "b"), [("日本", 1), ("x", 2)]), None, terminal=False).splitlines()
    assert [cell_len(line[:-1]) for line in lines] == [6, 6, 6]


def test_columns_of_one_name_keep_their_values() -> None:
    """As `SELECT 1 AS a, 2 AS a` has them."""
    assert shown(Grid(("a", "a"), [(1, 2)]), None, terminal=False).split() == ["a", "a", "1", "2"]
    assert "1 ┃ 2" in shown(Grid(("a", "a"), [(1, 2)]), 80).replace("│", "┃")


@pytest.mark.parametrize("terminal", [True, False])
def test_an_empty_table_has_its_head(terminal: bool) -> None:
    assert "rollout_id" in shown(Grid(COLUMNS, [], MAIN), 250, terminal=terminal)
    assert shown(Grid((), []), 80, terminal=terminal).strip() == "" or terminal


@pytest.mark.parametrize("width", [30, 80, 200])
def test_bars_take_what_is_left(width: int) -> None:
    rows = [("a", Bar(0, 1)), ("b", Bar(0.25, 0.5)), ("c", None)]
    lines = shown(Grid(("version", "plot"), rows), width).splitlines()
    full, part = (line.count("█") for line in lines[3:5])
    assert part == pytest.approx(full / 4, abs=1)
    assert full == min(40, width - 7 - len("version"))


def test_markup_of_values_is_text() -> None:
    assert "[red]x[/red]" in shown(Grid(("[b]a",), [("[red]x[/red]",)]), 80)


def test_only_uuids_are_shortened() -> None:
    assert short_id(ID) == "b302099a8057"
    for other in ("demo", "worker-" + ID, ID[:-1], ID.upper()):
        assert short_id(other) == other
    assert len({short_id(str(uuid.uuid4())) for _ in range(1000)}) == 1000
