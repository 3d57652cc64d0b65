"""What the commands print to a terminal."""

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.logging import RichHandler
from rich.table import Table

from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter
from millstream.pipeline.cli import output
from millstream.pipeline.cli.output import SafeConsole, amount_of, print_rows
from millstream.schemas.config.settings import load_settings
from tests.pipeline.cli.terminal import on_a_terminal

# Clear the screen; write to the clipboard; a title; a C1 sequence; overwrite the line; delete; turn the text around.
ATTACKS = (
    "\x1b[2J",
    "\x1b]52;c;cm0gLXJm\x07",
    "\x1b]0;root\x1b\\",
    "\x9b31m",
    "good\rbad",
    "a\x08b\x7f",
    "\u202egnp",
    "\x00",
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    console = SafeConsole(file=written, force_terminal=True, width=200, color_system="standard")
    monkeypatch.setattr(output, "out", console)
    return written


def harmless(text: str) -> bool:
    """Without control characters but those of rich's own colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 or c == "\u202e" for c in plain)


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_escape_sequences_of_records_are_shown_and_do_nothing(attack: str, terminal: io.StringIO) -> None:
    """Section F6: a table, an error, markup, and a log line."""
    console: Any = output.out
    print_rows(["error"], [[attack]], as_json=False)
    console.print(attack, markup=False)
    console.print("[red]error:[/red]", attack, highlight=False)
    console.print(Table(title=attack))
    log = logging.getLogger("attacked")
    log.addHandler(handler := RichHandler(console=console, show_path=False))
    log.error("lost: %s", attack)
    log.removeHandler(handler)
    assert harmless(terminal.getvalue()), ascii(terminal.getvalue())


@pytest.mark.parametrize("text", [*ATTACKS, "plain ü 😀"], ids=ascii)
def test_json_is_harmless_and_says_exactly_what_the_record_says(text: str, terminal: io.StringIO) -> None:
    print_rows(["error"], [[text]], as_json=True)
    assert harmless(terminal.getvalue())
    plain = io.StringIO()
    output.out = SafeConsole(file=plain)  # type: ignore[assignment]
    print_rows(["error"], [[text]], as_json=True)
    assert json.loads(plain.getvalue()) == [{"error": text}]


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        ((12_000, 40_000, "records", 1.5), "12,000 of 40,000 records · 8,000/s"),
        ((7, None, "examples", 0.0), "7 examples · 7,000/s"),
        ((3_400_000, None, "bytes", 2.0), "3.4 MB · 1.7 MB/s"),
    ],
)
def test_progress_counts_and_has_a_rate(amount: tuple[int, int | None, str, float], shown: str) -> None:
    assert amount_of(*amount) == shown


def test_progress_is_shown_on_a_terminal_and_data_stays_the_files(tmp_path: Path) -> None:
    body = """
from millstream.pipeline.cli.output import working
with working("writing", "examples") as show:
    for n in range(1, 1001):
        print("line", n)
        show(n, None)
"""
    lines = "".join(f"line {n}\n" for n in range(1, 1001))
    with (tmp_path / "data").open("w+") as data:
        shown = on_a_terminal([sys.executable, "-c", body], tmp_path, stdout=data)
        data.seek(0)
        assert data.read() == lines
    assert re.search(r"writing .*1,000 examples · [\d,]+/s", shown)
    piped = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == (lines, "")


def test_an_export_shows_how_much_it_has_written(tmp_path: Path) -> None:
    settings = load_settings(clickhouse_dsn=f"chdb://{tmp_path / 'store'}")
    writer = ClickHouseWriter(settings)
    writer.migrate()
    writer.close()
    query = "SELECT number FROM numbers(1000000)"
    command = [sys.executable, "-m", "millstream.pipeline", "export", query, "numbers.csv"]
    shown = on_a_terminal(command, tmp_path, MILLSTREAM_CLICKHOUSE_DSN=settings.clickhouse_dsn)
    assert (tmp_path / "numbers.csv").stat().st_size == 6_888_899
    assert re.search(r"writing numbers.csv .*6\.9 MB · [\d.]+ \w+/s", shown), shown


def test_colours_and_texts_stay(terminal: io.StringIO) -> None:
    output.out.print("[red]ü[/red]\nnext")
    assert terminal.getvalue() == "\x1b[31mü\x1b[0m\nnext\n"
