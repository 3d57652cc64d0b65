"""Commands that publish tasks, and cancel, pause and resume what is published."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from millstream.pipeline.cli.open import completed_id, open_settings, with_log
from millstream.pipeline.cli.output import Json, date, err, print_rows, say, working
from millstream.schemas.errors import ConfigError

if TYPE_CHECKING:
    from millstream.consumers.log.port import Log
    from millstream.schemas.wire.records import Control, RolloutEnd

app = typer.Typer()

Kind = Literal["rollout", "group", "experiment"]

Experiment = Annotated[
    str,
    typer.Argument(help="Experiment: its id, as in `millstream publish --experiment`, or the name of its run."),
]


@app.command(epilog="Example: millstream publish tasks.jsonl --group-size 8 --priority high")
def publish(
    file: Annotated[
        str,  # of a Path, typer does not know the dash
        typer.Argument(
            exists=True,
            dir_okay=False,
            readable=True,
            allow_dash=True,
            help='JSON lines: {"input": …, "mode": …, "metadata": …} (docs/tasks.md); - reads standard input.',
        ),
    ],
    group_size: Annotated[int, typer.Option(min=1, max=1000, help="Rollouts per line; they form a group.")] = 1,
    priority: Annotated[Literal["high", "normal", "low"], typer.Option(help="Which tasks go first.")] = "normal",
    experiment: Annotated[str, typer.Option(help="Experiment that the rollouts belong to.")] = "",
    skip_bad: Annotated[bool, typer.Option(help="Skip malformed lines and publish the others.")] = False,
    wait_s: Annotated[float, typer.Option(min=0, help="Wait for their ends for this long; 0: don't wait.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Publish the tasks of a file: all or none, unless --skip-bad is given. With --wait-s, show how they end."""
    from millstream.producers.log.port import closing
    from millstream.producers.tasks import TaskPublisher, read_tasks

    settings = open_settings()
    tasks, bad = read_tasks(
        Path("/dev/stdin" if file == "-" else file),
        settings,
        group_size=group_size,
        priority=priority,
        experiment_id=experiment,
        skip_bad=skip_bad,
    )
    for problem in bad:
        err.print(f"skipped: {problem}", highlight=False, markup=False)
    if not tasks:
        raise ConfigError(f'{file} holds no tasks: each line is a JSON object, such as {{"input": 1}}')
    ids = [task.rollout_id for task in tasks]

    async def work(log: "Log") -> "list[RolloutEnd]":
        from millstream.pipeline.training.collector import ends_of

        async with closing(log.producer()) as producer:
            publisher = TaskPublisher(producer, settings)
            if not wait_s:
                await publisher.publish(tasks, show)
                return []
            published = partial(publisher.publish, tasks)
            return await ends_of(log, producer, settings.topics, ids, published, wait_s, show)

    with working("rollouts that have ended", "rollouts") if wait_s else working("publishing", "tasks") as show:
        ends = with_log(settings, work)
    if not wait_s:
        print_rows(["rollout_id", "group_id"], [[t.rollout_id, t.group_id] for t in tasks], as_json, limit=20)
        return
    print_rows(
        ["rollout_id", "status", "attempts", "reward", "reason"],
        [[end.rollout_id, end.status, end.attempts, end.reward, end.reason] for end in ends],
        as_json,
        limit=20,
        texts=("reason",),
    )


@app.command(epilog="Example: millstream cancel --group 0190d2f2-7a5c-7d34-9e1b-2f4a8b6c1d00")
def cancel(
    rollout: Annotated[str, typer.Argument(help="Id of a rollout.")] = "",
    group: Annotated[str, typer.Option(help="All rollouts of a group.")] = "",
    experiment: Annotated[str, typer.Option(help="All of an experiment: its id, or the name of its run.")] = "",
) -> None:
    """Cancel rollouts that are queued, running, or published later."""
    if sum(map(bool, (rollout, group, experiment))) != 1:
        raise ConfigError("cancel takes one of: the id of a rollout, --group, --experiment")
    from millstream.producers.control import cancel_record

    kind: Kind = "rollout" if rollout else "group" if group else "experiment"
    _publish(
        kind,
        rollout or group or experiment,
        partial(cancel_record, kind),
        "{} is cancelled: what is queued, running or published later ends as cancelled",
    )


@app.command(epilog="Example: millstream pause my-experiment")
def pause(experiment: Experiment) -> None:
    """Stop claiming an experiment's tasks, and what is behind them on their partitions. Running attempts go on."""
    from millstream.producers.control import pause_record

    said = "{} is paused: its tasks wait until `millstream resume`"
    _publish("experiment", experiment, partial(pause_record, paused=True), said)


@app.command(epilog="Example: millstream resume my-experiment")
def resume(experiment: Experiment) -> None:
    """Claim a paused experiment's tasks again."""
    from millstream.producers.control import pause_record

    said = "{} is not paused: runners claim its tasks"
    _publish("experiment", experiment, partial(pause_record, paused=False), said)


@app.command(epilog="Example: millstream paused --json")
def paused(as_json: Json = False) -> None:
    """List paused experiments."""
    from millstream.consumers.control import read_pauses

    settings = open_settings()
    found = with_log(settings, lambda log: read_pauses(log, settings.topics))
    if not found and not as_json:
        err.print("no experiment is paused", highlight=False)
        return
    print_rows(["experiment", "paused since"], [[pause.name, date(pause.created_at)] for pause in found], as_json)


def _publish(kind: Kind, name: str, record: "Callable[[str], Control]", said: str) -> None:
    """Publishes a record about a rollout, a group or an experiment, which may be named by its run."""
    from millstream.consumers.control import find_experiment
    from millstream.producers.control import publish_control
    from millstream.producers.log.port import closing

    settings = open_settings()
    whole = completed_id(settings, name, kind) if kind != "experiment" else name

    async def work(log: "Log") -> str:
        found = await find_experiment(log, settings.topics, name) if kind == "experiment" else whole
        async with closing(log.producer()) as producer:
            await publish_control(producer, settings.topics, record(found))
        return found

    found, word = with_log(settings, work), "run" if kind == "experiment" else "short"
    say(said.format(f"{kind} {found}" + (f" ({word} {name})" if found != name else "")))
