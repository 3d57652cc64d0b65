"""Commands that train: from a file, again from an experiment's record; and the check of a run."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from millstream.pipeline.cli.open import open_settings
from millstream.pipeline.cli.output import MAX_PORT, HealthPort, Json, err, out, print_json, print_rows, say
from millstream.pipeline.cli.questions.experiments import Name, record_of

app = typer.Typer()


@app.command(epilog="Example: millstream train examples/calculator/train.toml")
def train(
    config: Annotated[Path, typer.Argument(help="TOML file; see examples/calculator/train.toml.")],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print the file with all defaults (resolved.toml), start nothing."
        ),
    ] = False,
    from_experiment: Annotated[
        str | None,
        typer.Option(help="Learn from this one's recorded rollouts, and ask for none: its id, or its run's name."),
    ] = None,
    health_port: HealthPort = 0,
    ui_port: Annotated[
        int, typer.Option(min=0, max=MAX_PORT, help="For a run in memory: shows it in a browser at this port; 0: off.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Train with a configuration file; show progress, then a summary. Needs the `train` extra."""
    if dry_run:
        from millstream.pipeline.training import config as training

        text, record = training.dry_run(config, from_experiment)
        if as_json:
            print_json(record)
        else:
            say(text.rstrip())
        return
    _train(config, health_port, as_json, from_experiment, ui_port or None)


@app.command(epilog="Example: millstream reproduce calculator --run-dir runs/calculator-again")
def reproduce(
    experiment: Name,
    run_dir: Annotated[
        Path | None, typer.Option(help="A new folder. Default: that of the first run, with -again.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Although model, tasks, versions or code differ.")] = False,
    health_port: HealthPort = 0,
    as_json: Json = False,
) -> None:
    """Train a second time as a record says, in a new folder. With the deterministic engine, in memory and without
    staleness, the weights are the same bit by bit. Refuses what has changed since."""
    from millstream.pipeline.training.config import again

    _, record = record_of(experiment)
    _train(again(record, run_dir, force=force), health_port, as_json)


@app.command(epilog="Example: millstream check runs/calculator")
def check(
    run: Annotated[Path, typer.Argument(help="The run's folder (run_dir).")],
    as_json: Json = False,
) -> None:
    """Compare a run's checkpoints, positions in the log, steps in the store and served weights. Exit code 1 if anything
    disagrees."""
    import asyncio

    from millstream.pipeline.training.reporting.check import check as compared  # needs torch

    found = asyncio.run(compared(run, open_settings()))
    words = {False: "", True: "wrong"}
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        rows = [[each.about, words[each.wrong], each.says, each.cure] for each in found]
        print_rows(["checked", "", "found", "what to do"], rows, False)
    if any(each.wrong for each in found):
        raise typer.Exit(1)


def _train(
    config: Path, health_port: int, as_json: bool, from_experiment: str | None = None, ui_port: int | None = None
) -> None:
    from millstream.pipeline.training.config import train_from

    console = err if as_json else out
    summary = train_from(config, console, health_port=health_port, from_experiment=from_experiment, ui_port=ui_port)
    values = summary.first_reward, summary.validation_reward, summary.rollouts, summary.rollouts_per_second
    columns = ["steps", "first_reward", "validation_reward", "rollouts", "rollouts_per_second", "seconds"]
    rounded = [value if value is None else round(value, 3) for value in (*values, summary.seconds)]
    print_rows(columns, [[len(summary.steps), *rounded]], as_json)
