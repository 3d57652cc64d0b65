"""What the commands print to a terminal."""

import io
import json
import logging
import re
from typing import Any

import pytest
from rich.logging import RichHandler
from rich.table import Table

from millstream.pipeline.cli import output
from millstream.pipeline.cli.output import SafeConsole, print_rows

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


def test_colours_and_texts_stay(terminal: io.StringIO) -> None:
    output.out.print("[red]ü[/red]\nnext")
    assert terminal.getvalue() == "\x1b[31mü\x1b[0m\nnext\n"
