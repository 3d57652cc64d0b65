"""The view of a run: a live table where it can be redrawn, lines elsewhere, nothing in the way of a script's output."""

from io import StringIO

import pytest
from rich.console import Console

from millstream.pipeline.training.report import StepReport
from millstream.pipeline.training.reporting import progress
from millstream.pipeline.training.reporting.progress import ProgressView, redraws, shown

REPORT = StepReport(0, "run.0.0", 0.5, 8, 0, 2.0, 3, 4.0, {"kl": 0.1})


def test_a_script_shows_its_steps_on_a_terminal_and_prints_nothing_into_a_pipe() -> None:
    terminal, pipe = StringIO(), StringIO()
    with shown("calc", Console(file=terminal, force_terminal=True)) as view:
        assert view is not None
        view.on_step(REPORT)
    assert "run.0.0" in terminal.getvalue()
    with shown("calc", Console(file=pipe)) as none:
        assert none is None
    with shown("calc", Console(file=pipe, force_terminal=True), quiet=True) as none:
        assert none is None
    assert pipe.getvalue() == ""


@pytest.mark.parametrize("widgets", [False, True])
def test_a_notebook_redraws_the_table_if_it_has_widgets(monkeypatch: pytest.MonkeyPatch, widgets: bool) -> None:
    monkeypatch.setattr(progress, "find_spec", lambda name: object() if widgets else None)
    console = Console(file=StringIO(), force_jupyter=True)
    assert redraws(console) is widgets


def test_a_command_prints_a_line_a_step_into_a_file() -> None:
    text = StringIO()
    with ProgressView(Console(file=text), "calc") as view:
        view.on_step(REPORT)
    assert text.getvalue().startswith("step   0  reward 0.500")
