"""``millstream steps``: the steps of a training run as a table, with a plot."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from millstream.pipeline.cli.open import open_settings, open_store
from millstream.pipeline.cli.output import (
    Json,
    Watch,
    bar_of,
    bar_range,
    check_watch,
    note,
    out,
    print_json,
    show_again,
)
from millstream.pipeline.cli.questions.experiments import known_experiment
from millstream.pipeline.cli.tables import Grid
from millstream.schemas.errors import ConfigError

app = typer.Typer()

MISSING = "–"


@app.command(epilog="Example: millstream steps calculator --plot kl")
def steps(
    experiment: Annotated[
        str | None, typer.Argument(help="Id of the experiment, or the name of its run; default: the one trained last.")
    ] = None,
    plot: Annotated[
        str, typer.Option(help="What to plot: a number of a step, such as idle_share, or one of its metrics.")
    ] = "reward_mean",
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Maximum number of steps, the last ones.")] = 50,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """List the steps of a training run: rewards, time, idle share, staleness, what was dropped; with a plot."""
    from millstream.pipeline.store.queries import LATEST_TRAINING, STEPS

    check_watch(watch, as_json)
    with open_store(open_settings()) as store:
        asked = None if experiment is None else known_experiment(store, experiment)

        def ask() -> list[dict[str, Any]]:
            rows = [[asked]] if asked is not None else store.sql(LATEST_TRAINING).rows
            wanted = {"experiment_id": rows[0][0], "limit": limit} if rows else None
            return store.sql(STEPS, wanted).records()[::-1] if wanted else []

        found = ask()
        if not found:
            note(f"the store has no steps{f' of experiment {asked}' if asked else ' yet'}")
        if as_json:
            print_json(found)
        elif watch:
            show_again(lambda: _table(ask(), plot))
        elif found:
            out.print(_table(found, plot))


def _table(found: Sequence[Mapping[str, Any]], plot: str) -> Grid:
    """Raises `ConfigError` if no step has a number ``plot``."""
    values = [_number(step, plot) for step in found]
    if found and not any(plot in step or plot in step["metrics"] for step in found):
        metrics = sorted({name for step in found for name in step["metrics"]})
        raise ConfigError(f"no step has a number {plot!r}; their metrics are: {', '.join(metrics) or 'none'}")
    low, size = bar_range(value for value in values if value is not None)
    title = f"run {found[0]['run']}, experiment {found[0]['experiment_id']}" if found else "no steps yet"
    columns = ["step", "epoch", "reward", "±", "val", "seconds", "idle", "stale", "groups", "dropped", "failed"]
    own = [] if plot in ("reward_mean", "idle_share") else [plot]
    rows = []
    for step, value in zip(found, values, strict=True):
        restored = f"from {step['restored_from']}" if step["restored_from"] else ""
        rows.append(
            [
                *(step["step"], step["epoch"], _short(step["reward_mean"]), _short(step["reward_std"])),
                *(_short(step["validation_reward"]), _short(step["seconds"]), _percent(step["idle_share"])),
                f"{_short(step['staleness_mean'])} ≤ {step['staleness_max']}" if step["staleness_max"] else "",
                step["groups"],
                ", ".join(f"{count} {reason}" for reason, count in step["dropped"].items()),
                step["failed"] or "",
                *([_short(value)] if own else []),
                "" if value is None else bar_of(value, low, size),
                "abandoned" if step["abandoned"] else restored,
            ]
        )
    bar = " " if own else plot
    dim = frozenset(n for n, step in enumerate(found) if step["abandoned"])
    main = ("step", "reward", "val", "seconds", "idle", "groups", "failed", *own, bar)
    return Grid([*columns, *own, bar, ""], rows, main, texts=("dropped",), title=title, dim=dim)


def _number(step: Mapping[str, Any], name: str) -> float | None:
    """None if it isn't a finite number."""
    value = step["metrics"].get(name, step.get(name))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share == share else MISSING


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
