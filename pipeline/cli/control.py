"""Commands that steer what is already published: cancel, pause, resume."""

from typing import Annotated

import typer

from millstream.consumers.log.port import Log
from millstream.pipeline.cli.open import with_log
from millstream.pipeline.cli.output import out
from millstream.producers.control import cancel_record, pause_record, publish_control
from millstream.producers.log.port import closing
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError
from millstream.schemas.wire.records import Control

app = typer.Typer()

Experiment = Annotated[str, typer.Argument(help="Its id, as given to `millstream publish --experiment`.")]


@app.command(epilog="Example: millstream cancel --group 0190d2f2-7a5c-7d34-9e1b-2f4a8b6c1d00")
def cancel(
    rollout: Annotated[str, typer.Argument(help="A rollout's id.")] = "",
    group: Annotated[str, typer.Option(help="All rollouts of a group.")] = "",
    experiment: Annotated[str, typer.Option(help="All rollouts of an experiment.")] = "",
) -> None:
    """End rollouts for good, whether they wait, run, or are yet to be published."""
    if sum(map(bool, (rollout, group, experiment))) != 1:
        raise ConfigError("cancel takes one of: the id of a rollout, --group, --experiment")
    if rollout:
        _publish(cancel_record("rollout", rollout))
    else:
        _publish(cancel_record("group", group) if group else cancel_record("experiment", experiment))


@app.command(epilog="Example: millstream pause my-experiment")
def pause(experiment: Experiment) -> None:
    """Claim no more tasks of an experiment; what runs goes on. Tasks behind them on the same partition wait as well."""
    _publish(pause_record(experiment, True))


@app.command(epilog="Example: millstream resume my-experiment")
def resume(experiment: Experiment) -> None:
    """Claim the tasks of a paused experiment again."""
    _publish(pause_record(experiment, False))


def _publish(record: Control) -> None:
    settings = load_settings()

    async def work(log: Log) -> None:
        async with closing(log.producer()) as producer:
            await publish_control(producer, settings.topics, record)

    with_log(settings, work)
    out.print(f"{record.kind} {record.name}: {record.body}", highlight=False)
