"""The live view of a training run: its last steps and totals."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from millstream.pipeline.training.report import StepReport

SHOWN_STEPS = 12
BAR_WIDTH = 12  # the table fits 80 columns


def redraws(console: Console) -> bool:
    """Whether what is shown can be replaced: on a terminal, and in a notebook that has ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


@contextmanager
def shown(title: str, console: Console | None = None, *, quiet: bool = False) -> "Iterator[ProgressView | None]":
    """A view for a script or notebook: none if it is to be ``quiet``, or where its output is a file or a pipe."""
    console = console or Console()
    if quiet or not (console.is_terminal or console.is_jupyter):
        yield None
        return
    with ProgressView(console, title) as view:
        yield view


class ProgressView:
    """A live table on a terminal and in a notebook, a line for each step elsewhere."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._steps: deque[StepReport] = deque(maxlen=SHOWN_STEPS)
        self._live = Live(console=console, refresh_per_second=4, transient=False) if redraws(console) else None

    def __enter__(self) -> "ProgressView":
        if self._live is not None:
            self._live.start()
            self._live.update(Text(f"{self._title}: waiting for the first step …"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def on_step(self, report: StepReport) -> None:
        self._steps.append(report)
        if self._live is not None:
            self._live.update(self._table())
            return
        self._console.print(
            f"step {report.step:3d}  reward {report.reward:.3f}  {report.rollouts_per_second:6.1f} rollouts/s  "
            f"{report.spans} spans  policy {report.model_version}"
            + (f"  idle {report.idle_share:.0%}" if report.idle_share is not None else "")
            + (f"  {report.staleness_mean:.1f} versions old" * bool(report.staleness_max))
            + (f"  {report.failed} failed" * bool(report.failed)),
            highlight=False,
        )

    def _table(self) -> Group:
        last = self._steps[-1]
        table = Table("step", "policy", "reward", "", "failed", "entropy", "seconds")
        for step in self._steps:
            bar = "█" * round(step.reward * BAR_WIDTH)
            entropy = step.metrics.get("entropy")
            table.add_row(
                str(step.step),
                step.model_version,
                f"{step.reward:.3f}",
                Text(bar, style="green"),
                str(step.failed or ""),
                "" if entropy is None else f"{entropy:.2f}",
                f"{step.seconds:.1f}",
            )
        line = f"{self._title} · {last.rollouts_per_second:.0f} rollouts/s · {last.spans} spans · "
        return Group(table, Text(line + f"policy {last.model_version}"))
