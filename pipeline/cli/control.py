"""Commands that publish tasks, and cancel, pause and resume what is published."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from millstream.consumers.control import read_pauses
from millstream.consumers.log.port import Log
from millstream.pipeline.cli.open import with_log
from millstream.pipeline.cli.output import Json, date, err, print_rows, say
from millstream.producers.control import cancel_record, pause_record, publish_control
from millstream.producers.log.port import closing
from millstream.producers.tasks import TaskPublisher, read_tasks
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.records import Control

app = typer.Typer()

Experiment = Annotated[str, typer.Argument(help="Experiment id, as given to `millstream publish --experiment`.")]


@app.command(epilog="Example: millstream publish tasks.jsonl --group-size 8 --priority high")
def publish(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, readable=True, help='JSON lines: {"input": …, "mode": …, "metadata": …}.'
        ),
    ],
    group_size: Annotated[int, typer.Option(min=1, max=1000, help="Rollouts per line; they form a group.")] = 1,
    priority: Annotated[Literal["high", "normal", "low"], typer.Option(help="Which tasks go first.")] = "normal",
    experiment: Annotated[str, typer.Option(help="Experiment that the rollouts belong to.")] = "",
    skip_bad: Annotated[bool, typer.Option(help="Skip malformed lines and publish the others.")] = False,
    as_json: Json = False,
) -> None:
    """Publish the tasks of a file: all or none, unless --skip-bad is given."""
    settings = load_settings()
    tasks, bad = read_tasks(
        file, settings, group_size=group_size, priority=priority, experiment_id=experiment, skip_bad=skip_bad
    )
    for problem in bad:
        err.print(f"skipped: {problem}", highlight=False, markup=False)

    async def work(log: Log) -> None:
        async with closing(log.producer()) as producer:
            await TaskPublisher(producer, settings).publish(tasks)

    if not tasks:
        raise ConfigError(f'{file} holds no tasks: each line is a JSON object, such as {{"input": 1}}')
    with_log(settings, work)
    print_rows(["rollout_id", "group_id"], [[t.rollout_id, t.group_id] for t in tasks], as_json, limit=20)


@app.command(epilog="Example: millstream cancel --group 0190d2f2-7a5c-7d34-9e1b-2f4a8b6c1d00")
def cancel(
    rollout: Annotated[str, typer.Argument(help="Id of a rollout.")] = "",
    group: Annotated[str, typer.Option(help="All rollouts of a group.")] = "",
    experiment: Annotated[str, typer.Option(help="All rollouts of an experiment.")] = "",
) -> None:
    """Cancel rollouts that are queued, running, or published later."""
    if sum(map(bool, (rollout, group, experiment))) != 1:
        raise ConfigError("cancel takes one of: the id of a rollout, --group, --experiment")
    if rollout:
        record, what = cancel_record("rollout", rollout), f"rollout {rollout}"
    elif group:
        record, what = cancel_record("group", group), f"group {group}"
    else:
        record, what = cancel_record("experiment", experiment), f"experiment {experiment}"
    _publish(record, f"{what} is cancelled: what is queued, running or published later ends as cancelled")


@app.command(epilog="Example: millstream pause my-experiment")
def pause(experiment: Experiment) -> None:
    """Stop claiming an experiment's tasks, and what is behind them on their partitions. Running attempts go on."""
    said = f"experiment {experiment} is paused: its tasks wait until `millstream resume {experiment}`"
    _publish(pause_record(experiment, True), said)


@app.command(epilog="Example: millstream resume my-experiment")
def resume(experiment: Experiment) -> None:
    """Claim a paused experiment's tasks again."""
    _publish(pause_record(experiment, False), f"experiment {experiment} is not paused: runners claim its tasks")


@app.command(epilog="Example: millstream paused --json")
def paused(as_json: Json = False) -> None:
    """List paused experiments."""
    settings = load_settings()
    found = with_log(settings, lambda log: read_pauses(log, settings.topics))
    if not found and not as_json:
        err.print("no experiment is paused", highlight=False)
        return
    print_rows(["experiment", "paused since"], [[pause.name, date(pause.created_at)] for pause in found], as_json)


def _publish(record: Control, said: str) -> None:
    settings = load_settings()

    async def work(log: Log) -> None:
        async with closing(log.producer()) as producer:
            await publish_control(producer, settings.topics, record)

    with_log(settings, work)
    say(said)
