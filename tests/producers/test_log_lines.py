"""Log lines: one for each event."""

import io
import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from millstream.producers import log_lines
from millstream.producers.log_lines import JsonLines, TextLines, rollout_fields, write_logs

LONG = "x" * 500


def record(message: str, *arguments: object, error: BaseException | None = None, **extra: Any) -> logging.LogRecord:
    raised = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("millstream.consumers.runner", logging.WARNING, "f.py", 1, message, arguments, raised)
    made.__dict__.update(extra)
    made.created = 1_800_000_000.0625
    return made


def text(made: logging.LogRecord, **here: str) -> str:
    return TextLines("runner", lambda: here).format(made)


def as_json(made: logging.LogRecord, **here: str) -> Any:
    line = JsonLines("runner", lambda: here).format(made)
    assert "\n" not in line
    return json.loads(line)


def test_a_line_of_text_has_time_level_role_logger_and_fields() -> None:
    """Entry B2."""
    line = text(record("%d tasks", 3, **rollout_fields("r1", "a1")))
    assert line == "2027-01-15T08:00:00.062Z WARNING runner consumers.runner: 3 tasks rollout=r1 attempt=a1"


def test_a_line_of_json_has_the_same_fields() -> None:
    assert as_json(record("%d tasks", 3, **rollout_fields("r1", "a1"))) == {
        "time": "2027-01-15T08:00:00.062Z",
        "level": "warning",
        "role": "runner",
        "logger": "millstream.consumers.runner",
        "message": "3 tasks",
        "rollout": "r1",
        "attempt": "a1",
    }


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("a\r\nb", "a\\r\\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202ex", "\\u202ex"),
        (LONG, LONG),
        ("ü 😀", "ü 😀"),
        ("100 %", "100 %"),
    ],
    ids=ascii,
)
def test_an_event_is_one_line_of_any_length_without_control_characters(message: str, shown: str) -> None:
    assert text(record("%s", message)).endswith(f": {shown}")
    assert as_json(record("%s", message))["message"] == message
    assert text(record("m", rollout=message)).endswith(f": m rollout={shown}")


def test_a_stack_follows_indented_or_is_a_field() -> None:
    try:
        raise ValueError("no\ngood\x1b[2J")
    except ValueError as error:
        made = record("failed", error=error)
    first, *stack = text(made).splitlines()
    assert first.endswith("failed")
    assert stack[0] == "    Traceback (most recent call last):"
    assert stack[-1] == "    good\\x1b[2J"
    assert all(line.startswith("    ") for line in stack)
    assert "ValueError: no\ngood" in as_json(made)["stack"]


def test_fields_are_those_of_the_running_attempt_unless_the_event_has_its_own() -> None:
    assert text(record("m"), rollout="r1", attempt="a1").endswith(": m rollout=r1 attempt=a1")
    assert text(record("m", rollout="r2"), rollout="r1", attempt="a1").endswith(": m rollout=r2")
    assert as_json(record("m"), rollout="r1") == as_json(record("m", rollout="r1"))


def test_text_names_an_id_once() -> None:
    assert text(record("rollout %s is late", "r1", **rollout_fields("r1"))).endswith(": rollout r1 is late")


def test_level_and_form_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    ours = logging.getLogger("test_log_lines")
    ours.propagate = False
    monkeypatch.setattr(log_lines, "_ours", None)
    write_logs("info", "text", "sink", ours, stream=written)
    ours.info("one")
    write_logs("warning", "json", "sink", ours, stream=written)
    ours.info("two")
    ours.warning("three")
    first, second = written.getvalue().splitlines()
    assert first.endswith("INFO    sink test_log_lines: one")
    assert json.loads(second)["message"] == "three"


def test_lines_of_a_process_are_never_wrapped() -> None:
    """Entry B2: in a file, too."""
    code = (
        f"import logging; from millstream.producers.log_lines import write_logs; write_logs(); logging.info({LONG!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"root: {LONG}")
