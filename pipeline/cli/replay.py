"""``millstream replay``."""

from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from millstream.consumers.adapter.replay import Replay, ToReward
from millstream.consumers.adapter.triplets import TripletMaker
from millstream.consumers.log.port import Log
from millstream.pipeline.cli.open import with_log
from millstream.pipeline.cli.output import Json, print_rows
from millstream.pipeline.replay import ReplaySummary, Start, open_output, run_replay
from millstream.schemas.config.settings import load_settings
from millstream.schemas.import_path import load_object

app = typer.Typer()


@app.command(epilog="Example: millstream replay --experiment my-run --reward rewards:strict --to my-run.strict")
def replay(
    experiment: Annotated[str, typer.Option(help="The id of the experiment to replay.")],
    to: Annotated[str, typer.Option(help="The new topic that it writes to.")],
    start: Annotated[
        str, typer.Option("--from", help="partition:offset,… on events, or a time (ISO 8601); else the beginning.")
    ] = "",
    function: Annotated[str, typer.Option("--adapter", help="module:attribute of your own Trace → triplets.")] = "",
    reward: Annotated[
        str, typer.Option(help="module:attribute of a Trace → float or None, in place of what agents emitted.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make triplets again from recorded events, with another adapter or reward function. Changes nothing else."""
    settings = load_settings()
    folder = str(Path.cwd())
    chosen = load_object("adapter", function, folder) if function else TripletMaker(settings.triplets)
    rewarded: ToReward | None = load_object("reward", reward, folder) if reward else None

    begin = Start.parse(start) if start else None

    async def work(log: Log) -> ReplaySummary:
        output = await open_output(to, log, settings)
        return await run_replay(log, settings.topics, Replay(experiment, chosen, rewarded), output, begin)

    done = with_log(settings, work)
    columns = ("rollouts", "triplets", "trainable", "reward_mean", "incomplete", "open", "unreadable")
    mean = fmean(done.rewards) if done.rewards else None
    row = [mean if name == "reward_mean" else getattr(done, name) for name in columns]
    print_rows(columns, [row], as_json)
