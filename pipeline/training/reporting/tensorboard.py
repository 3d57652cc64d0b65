"""Writes each step's numbers as TensorBoard events. Needs the package ``tensorboard``, and torch."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from millstream.pipeline.training.report import StepReport
from millstream.schemas.errors import ConfigError

FOLDER: Final = "tensorboard"  # within the run's folder


def tensorboard(run_dir: Path) -> Callable[[StepReport], None]:
    """A function that writes a step. The first one replaces what an earlier trainer has written of it and later steps.

    Raises `ConfigError` if the package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"[report] tensorboard needs a package ({error}): pip install tensorboard, or leave it out"
        ) from error
    writer: Any = None

    def write(report: StepReport) -> None:
        nonlocal writer
        step = report.step + 1
        if writer is None:
            writer = SummaryWriter(str(run_dir / FOLDER), purge_step=step)
        for name, value in scalars(report).items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def scalars(report: StepReport) -> Mapping[str, float]:
    """The numbers of a step by TensorBoard's tags: what can't be a number is left out."""
    found: dict[str, Any] = {
        "reward/mean": report.reward,
        "reward/std": report.reward_std,
        "reward/validation": report.validation_reward,
        "rollouts/failed": report.failed,
        "rollouts/per_second": report.rollouts_per_second,
        "rollouts/groups": report.groups,
        "rollouts/tokens": report.tokens,
        "staleness/mean": report.staleness_mean,
        "staleness/max": report.staleness_max,
        "time/seconds": report.seconds,
        "time/idle_share": report.idle_share,
        **{f"time/{phase}": seconds for phase, seconds in report.phases.items()},
        **{f"dropped/{reason}": count for reason, count in report.dropped.items()},
        **{f"learner/{name}": value for name, value in report.metrics.items()},
    }
    numbers = {}
    for name, value in found.items():
        if value is not None:
            with suppress(TypeError, ValueError, OverflowError, RuntimeError):
                numbers[name] = float(value)
    return numbers
